"""Calibration: what is measured, what is judged wrong, who wins, and that the choice is the user's from then on."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vitreg_kernels import RegisterViT, ViTConfig, calibrate, cli, dispatch, explain
from vitreg_kernels.dispatch import calibration, devices, preferences
from vitreg_kernels.dispatch.tables import Default, Table
from vitreg_kernels.functional import register_attention, residual_layer_norm
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.calibrate import contest as contests
from vitreg_kernels.measure.calibrate import idle, subjects
from vitreg_kernels.measure.calibrate.contest import Race, decide, run_race, unquiet
from vitreg_kernels.measure.calibrate.judge import Judge
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.types import Rope
from vitreg_kernels.ops.catalogue import OPS

CPU = torch.device("cpu")
SHAPE = (2, 3, 21, 16)
TINY = ViTConfig(image_size=28, patch_size=14, dim=32, depth=2, num_heads=2, num_registers=4)


@pytest.fixture
def cache(tmp_path, monkeypatch, clock):
    """A cache of the user's own, an idle machine, and a clock that only backends move."""
    monkeypatch.delenv("VITREG_CALIBRATION")
    monkeypatch.setenv("VITREG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(idle, "check", lambda device: None)
    monkeypatch.setattr(contests, "time", clock)
    monkeypatch.setattr(contests, "_SAMPLE_MS", 0.0)
    monkeypatch.setattr(contests, "_BUDGET_S", 0.0)
    monkeypatch.setattr(contests, "_FEWEST_ROUNDS", 3)
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**12)
    dispatch.read_calibration()
    yield tmp_path / "cache" / "calibration.json"
    monkeypatch.undo()
    dispatch.read_calibration()


@pytest.fixture
def takes(change_backends, clock, cache):
    """Makes a backend's forward take so many milliseconds by that clock."""

    def takes(op: str = "attention", **milliseconds: float) -> None:
        for name, ms in milliseconds.items():
            forward = dispatch.find(OPS[op].backends, name).forward

            def slowly(inputs, forward=forward, ms=ms):
                clock.sleep(1e-3 * ms)
                return forward(inputs)

            change_backends(name, op=op, forward=slowly)

    return takes


@pytest.fixture(autouse=True)
def _sdpa_and_the_reference_alone(change_backends):
    """Whether there was a compiler decides nothing here, and torch's kernels are those of ``sdpa``."""
    for name in ("cpu", "sdpa_flash", "sdpa_math"):
        change_backends(name, faults=lambda: ["away for this test"])


def of_attention(**changes):
    return subjects.of_shape(SHAPE, torch.float32, CPU, **changes)[1]


def raced(*races: dict[str, float | list[float]], **far_behind: float) -> Race:
    """Races of ten rounds, each backend's times the same in all of them or as listed."""
    rounds = tuple({name: [ms] * 10 if isinstance(ms, float) else ms for name, ms in its.items()} for its in races)
    return Race({**dict.fromkeys(races[0], 9.0), **far_behind}, rounds)


class TestTheRule:
    def test_a_clear_lead_in_both_races(self):
        race = raced({"a": 1.0, "b": 1.04}, {"a": 1.0, "b": 1.2})
        assert decide(race, "b") == ("a", "")
        assert decide(race, "a") == ("a", "")

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"a": 1.0, "b": 1.02}, {"a": 1.0, "b": 1.2}),
            ({"a": 1.0, "b": 1.2}, {"a": 1.0, "b": 0.95}),
            ({"a": 1.0, "b": 1.2}, {"a": 1.0, "b": [1.2] * 7 + [1.0] * 3}),
        ],
        ids=["too little", "behind in the second", "not in four rounds of five"],
    )
    def test_a_lead_by_luck(self, first, second):
        winner, why = decide(raced(first, second), "b")
        assert winner == "a"
        assert why.startswith("a was no 1.03 times as fast as b in a race, but ")

    def test_what_slows_both_down_does_not_count(self):
        """A busy neighbour visits both of a round."""
        slow = [1.0, 3.0] * 5
        assert decide(raced(*[{"a": slow, "b": [1.1 * ms for ms in slow]}] * 2), "b") == ("a", "")

    def test_the_next_best_is_not_what_counts_for_a_change(self):
        """Of two good ones the better replaces the bad one, though it leads the other by little."""
        race = raced(*[{"a": 1.0, "b": 1.01, "c": 2.0}] * 2)
        assert decide(race, "c") == ("a", "")
        assert decide(race, "a")[1], "but to keep it for good it has to lead"

    def test_who_is_far_behind_is_no_rival(self):
        assert decide(raced(*[{"a": 1.0}] * 2, b=90.0), "a") == ("a", "")

    def test_what_was_wrong_is_replaced_by_the_fastest_whatever_the_lead(self):
        assert decide(raced(*[{"a": 1.0, "b": 1.001}] * 2), "wrong") == ("a", "")

    def test_alone(self):
        assert decide(raced(*[{"a": 1.0}] * 2), "a") == ("a", "no other backend serves this call and is right")

    @pytest.mark.parametrize(("device", "spread"), [("cuda", 1.16), ("cpu", 1.51)])
    @pytest.mark.parametrize("noisy", ["a", "b"])
    def test_times_that_vary(self, noisy, device, spread):
        quiet = {"a": 1.0, "b": 2.0}
        noise = {**quiet, noisy: [quiet[noisy]] * 7 + [spread * quiet[noisy]] * 3}
        race, device = raced(quiet, noise), torch.device(device)
        said = f"the times of {noisy} varied by {spread:.2f}: something else was using the machine"
        assert unquiet(race, {"a", "b"}, device) == said
        assert not unquiet(race, {"a", "b"} - {noisy}, device)
        calmer = {**quiet, noisy: [quiet[noisy]] * 7 + [(spread - 0.02) * quiet[noisy]] * 3}
        assert not unquiet(raced(quiet, calmer), {"a", "b"}, device)

    def test_the_present_default_races_however_slow_it_was_once(self, cache, takes):
        """One slow call, a late compile for one, is no race."""
        takes(sdpa=1.0, reference=100.0)
        race = run_race(of_attention().make(False), ["sdpa", "reference"], "reference", CPU)
        assert race.races[0].keys() == {"sdpa", "reference"}
        assert run_race(of_attention().make(False), ["sdpa", "reference"], "sdpa", CPU).races[0].keys() == {"sdpa"}

    def test_nobody_has_too_few_rounds(self, cache, takes, monkeypatch):
        monkeypatch.setattr(contests, "_FEWEST_ROUNDS", 9)
        takes(sdpa=50.0, reference=120.0)
        for its in run_race(of_attention().make(False), ["sdpa", "reference"], "sdpa", CPU).races:
            assert [len(times) for times in its.values()] == [9, 9]


class TestCalibration:
    def chosen(self, *, gradients: bool = False) -> str | None:
        return explain(torch.randn(SHAPE).requires_grad_(gradients)).backend

    def compete(self, change_backends, takes, monkeypatch, **milliseconds):
        """The reference takes part, since nothing else stands beside sdpa on every CPU."""
        monkeypatch.setattr(contests, "ORACLE", "nobody")
        takes(**milliseconds)

    def test_the_fastest_becomes_the_default(self, cache, takes, change_backends, monkeypatch):
        assert self.chosen() == "sdpa"
        self.compete(change_backends, takes, monkeypatch, sdpa=3.0, reference=2.0)
        done = calibrate([SHAPE])
        first = done.outcomes[2]
        assert (first.before, first.backend, first.decided) == ("sdpa", "reference", True)
        assert 1.2 < first.lead < 1.6
        assert done.file == cache
        assert self.chosen() == self.chosen(gradients=True) == "reference"
        assert explain(torch.randn(SHAPE)).decided_by.startswith("your calibration, measured 20")
        change_backends("reference", op="attention", forward=lambda inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            register_attention(*[torch.randn(SHAPE)] * 3)

    def test_torchs_kernels_take_part_one_by_one(self, cache, takes, change_backends):
        for name in ("sdpa_flash", "sdpa_math"):
            change_backends(name, faults=list)
        takes(sdpa=3.0, sdpa_flash=2.0, sdpa_math=5.0)
        outcome = calibrate([SHAPE]).outcomes[2]
        assert set(outcome.times_ms) == {"sdpa", "sdpa_flash", "sdpa_math"}
        assert (outcome.before, outcome.backend, outcome.decided) == ("sdpa", "sdpa_flash", True)
        assert self.chosen() == self.chosen(gradients=True) == "sdpa_flash"

    def test_nothing_is_written_where_nobody_leads(self, cache, takes, change_backends, monkeypatch):
        self.compete(change_backends, takes, monkeypatch, sdpa=50.0, reference=50.0)
        outcome = calibrate([SHAPE]).outcomes[2]
        assert (outcome.backend, outcome.decided) == ("sdpa", False)
        assert "no 1.03 times as fast" in outcome.reason
        assert self.chosen() == "sdpa"

    def test_a_dry_run_writes_nothing(self, cache, takes, change_backends, monkeypatch):
        self.compete(change_backends, takes, monkeypatch, sdpa=3.0, reference=2.0)
        done = calibrate([SHAPE], dry_run=True)
        assert done.outcomes[2].decided
        assert done.file is None
        assert not cache.exists()
        assert self.chosen() == "sdpa"

    @pytest.mark.parametrize("fault", ["wrong", "reads beyond", "broke"])
    def test_a_wrong_backend_is_no_default_there_however_fast(self, cache, takes, change_backends, monkeypatch, fault):
        self.compete(change_backends, takes, monkeypatch, sdpa=1.0, reference=9.0)
        forward = dispatch.find(OPS["attention"].backends, "sdpa").forward

        def broken(inputs):
            if fault == "broke":
                raise IndexError("out of its bounds")
            if fault == "reads beyond":
                beyond = inputs.query.as_strided((1,), (1,), inputs.query.storage_offset() - 1)
                return forward(inputs._replace(query=inputs.query + 0 * beyond))
            result = forward(inputs)
            return result._replace(output=1.01 * result.output)

        change_backends("sdpa", op="attention", forward=broken, opaque=False)
        monkeypatch.setattr(contests, "attempted", partial(_as_ours, contests.attempted))
        done = calibrate([SHAPE])
        outcome = done.outcomes[2]
        assert (outcome.before, outcome.backend, outcome.decided) == ("sdpa", "reference", True)
        assert "IndexError" in outcome.wrong["sdpa"] if fault == "broke" else "error" in outcome.wrong["sdpa"]
        assert self.chosen() == "reference"
        assert "was wrong on this machine" in explain(torch.randn(SHAPE)).reasons["sdpa"][0]

    def test_a_kernel_of_ours_whose_bits_change_is_wrong(self, cache, change_backends):
        judge = Judge(of_attention(), False, CPU)
        sdpa = dispatch.find(OPS["attention"].backends, "sdpa")
        forward = sdpa.forward
        turns = iter(range(9))

        def unsteady(inputs):
            result = forward(inputs)
            return result._replace(output=result.output * (1 + next(turns) * 2**-23))

        change_backends("sdpa", op="attention", forward=unsteady)
        assert not judge.verdict(sdpa).wrong
        assert "other bits" in judge.verdict(_Opaque(sdpa)).wrong

    def test_what_a_kernel_of_ours_never_writes_is_seen(self, cache, change_backends):
        judge = Judge(of_attention(), False, CPU)
        sdpa = dispatch.find(OPS["attention"].backends, "sdpa")
        forward = sdpa.forward

        def forgetful(inputs):
            result = forward(inputs)
            return result._replace(output=result.output + 0 * torch.empty(1))

        change_backends("sdpa", op="attention", forward=forgetful)
        assert "output" in judge.verdict(_Opaque(sdpa)).wrong

    @pytest.mark.parametrize("wrong", [False, True])
    def test_times_that_vary_change_nothing_but_what_is_wrong(self, cache, takes, change_backends, monkeypatch, wrong):
        self.compete(change_backends, takes, monkeypatch, sdpa=3.0, reference=2.0)
        monkeypatch.setattr(contests, "unquiet", lambda race, names, device: "noise")
        if wrong:
            forward = dispatch.find(OPS["attention"].backends, "sdpa").forward
            change_backends(
                "sdpa", op="attention", forward=lambda x: (r := forward(x))._replace(output=1.01 * r.output)
            )
        outcome = calibrate([SHAPE]).outcomes[2]
        assert (outcome.backend, outcome.decided) == (("reference", True) if wrong else ("sdpa", False))
        written = [one for one in calibration.read().measurements if one.op == "attention"]
        assert bool(written) is wrong
        assert not any(one.times_ms for one in written), "times that cannot be trusted"

    def test_every_op(self, cache, takes):
        """Not attention alone: of the others, composite is what there is here."""
        for op in ("residual_norm", "token_norms", "assemble"):
            takes(op, composite=5.0)
        done = calibrate([SHAPE])
        assert {(o.subject.op, o.gradients) for o in done.outcomes} == {
            *((op, gradients) for op in ("attention", "residual_norm", "assemble") for gradients in (False, True)),
            ("token_norms", False),
        }
        assert not any(outcome.wrong or outcome.refused for outcome in done.outcomes)

    def test_what_was_decided_before_a_cut_is_kept(self, cache, takes, change_backends, monkeypatch):
        self.compete(change_backends, takes, monkeypatch, sdpa=3.0, reference=2.0)

        def cut(done, of, outcome):
            if done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate([SHAPE], progress=cut)
        (kept,) = calibration.read().measurements
        assert (kept.variant, kept.backend) == ("packed projection", "reference")
        assert preferences.TABLES[0].rows, "and is in force"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (([(1, 2, 3)],), "a shape must be that of a query, B,H,N,D"),
            (([(1, 2, 0, 8)],), "each at least 1"),
            (([(1, 1, 9, 1)],), r"H \* D at least 16"),
            (([],), "there is nothing to calibrate"),
            ((nn.Linear(2, 2),), "a model is calibrated on a batch"),
            ((nn.Linear(2, 2), torch.zeros(1, 2)), "Linear calls no op of this library"),
            (([SHAPE], torch.zeros(1)), "a batch is of a model"),
        ],
    )
    def test_what_cannot_be_calibrated(self, cache, arguments, said):
        with pytest.raises(ValueError, match=said):
            calibrate(*arguments)
        assert not cache.exists()

    def test_a_cache_that_cannot_be_written_is_told_before_anything_is_measured(self, cache, monkeypatch):
        cache.parent.write_text("a file where the folder would be")
        monkeypatch.setattr(contests, "contest", None)
        with pytest.raises(OSError, match=re.escape(str(cache.parent))):
            calibrate([SHAPE])

    def test_a_busy_machine_is_left_alone(self, cache, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setenv("VITREG_CACHE_DIR", str(cache.parent))
        monkeypatch.delenv("VITREG_CALIBRATION")
        monkeypatch.setattr(idle, "_of_processors", lambda: 11.0)
        with pytest.raises(RuntimeError, match=r"the processor is busy \(11% of it\): calibrate when nothing else"):
            calibrate([SHAPE])


class TestSubjects:
    def test_of_a_shape_with_rope_and_mask(self):
        subject = of_attention(rope=True, mask=True)
        call = subject.make(True)
        assert call.request.features == (features.KEY_PADDING_MASK, features.ROPE)
        assert "rope, masked" in subject.size
        assert not call.reasons_against("sdpa")

    def test_each_image_is_a_call_of_its_own(self):
        """What the oracle says of an image is what it says of it among others."""
        subject = of_attention(rope=True, mask=True)
        whole = subject.make(True)
        together = whole.run("reference")
        for image in range(SHAPE[0]):
            alone = subjects.part(whole, image).run("reference")
            for name, x in alone.items():
                torch.testing.assert_close(x, together[name][image : image + 1])

    @pytest.mark.parametrize("autocast", [False, True])
    def test_of_a_model_all_that_it_calls(self, autocast):
        """Each call that is another by what tells times apart, and no other."""
        model = RegisterViT(dataclasses.replace(TINY, position="rope", position_rows="patches", layer_scale=0.1))
        images = torch.randn(2, 3, 28, 28)
        before = torch.random.get_rng_state()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = subjects.of_model(model, images)
        assert torch.equal(torch.random.get_rng_state(), before)
        to = "bfloat16" if autocast else "float32"
        short = "bf16" if autocast else "fp32"
        assert {(subject.op, str(subject)) for subject in found} == {
            ("assemble", f"2 x 4 x 32, {short}"),
            ("attention", f"2 x 2 heads, 9 tokens, head dim 16, rope, {short}, packed projection"),
            ("residual_norm", f"2 x 9 x 32, fp32, LayerNorm to {to}"),
            ("residual_norm", f"2 x 9 x 32, fp32, LayerNorm, {to} scaled branch to {to}"),
        }
        asked = set()

        def meet(request, *inputs):
            asked.add(request._replace(workload=None))

        with subjects.met(meet), torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            model(images)
        assert {subject.make(False).request._replace(workload=None) for subject in found} == asked
        for subject in found:
            for gradients in subject.modes:
                verdict = Judge(subject, gradients, CPU).verdict(
                    dispatch.find(OPS[subject.op].backends, "sdpa" if subject.op == "attention" else "composite")
                )
                assert not verdict.wrong, (subject, verdict)

    def test_the_variants_are_those_of_the_calls_themselves(self, cache, monkeypatch):
        """A measurement is found by the call that it was made for."""
        model = RegisterViT(dataclasses.replace(TINY, layer_scale=0.1)).eval()
        images = torch.randn(2, 3, 28, 28)
        calibrate(model, images)
        keys = {one.key for one in calibration.read().measurements}
        rows = {key: Default("sdpa" if key.op == "attention" else "composite", "2026-11-30") for key in keys}
        monkeypatch.setattr(preferences, "TABLES", (Table.of("mine", rows),))
        dispatch.rules.select_cached.cache_clear()
        found = []
        decides = preferences.measured
        monkeypatch.setattr(preferences, "measured", lambda call: found.append((call, decides(call))) or decides(call))
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                model(images)
        assert all(row is not None for _, row in found)
        assert {preferences.key_of(request, devices.kind("cpu", 0)) for request, _ in found} == keys

    def test_nothing_is_met_afterwards(self):
        met = []
        with subjects.met(lambda *call: met.append(call)):
            residual_layer_norm(torch.randn(1, 2, 8), weight=torch.ones(8))
        residual_layer_norm(torch.randn(1, 2, 8), weight=torch.ones(8))
        assert len(met) == 1

    def test_every_image_is_judged(self):
        """Not three of them alone: an image in between, or one element of it, may be what a kernel leaves out."""
        subject = subjects.of_shape((8, 2, 21, 16), torch.float32, CPU)[1]
        judge = Judge(subject, True, CPU)
        sdpa = dispatch.find(OPS["attention"].backends, "sdpa")
        assert not judge.verdict(sdpa).wrong
        run = judge._guarded.run

        for name in run("sdpa"):
            for image in range(8):

                def spoilt(backend, name=name, image=image):
                    tensors = run(backend)
                    tensors[name] = tensors[name].clone()
                    tensors[name][image, -1, -1, -1] += 1.0
                    return tensors

                judge._guarded = SimpleNamespace(run=spoilt)
                assert name in judge.verdict(sdpa).wrong, (name, image)

    def test_expanded_tables_and_masks(self):
        """What a model expands over its batch stays so, and is nobody's fault."""
        angles = torch.rand(16, 16).expand(2, 16, 16)
        options = {"rope": Rope(angles.cos().expand(2, 16, 16), angles.sin()), "num_prefix_tokens": 5}
        options["rope"] = Rope(torch.rand(16, 16).expand(2, 16, 16), torch.rand(16, 16).expand(2, 16, 16))
        options["attn_mask"] = torch.rand(1, 1, 21, 21).expand(2, 3, 21, 21)
        subject = subjects._attention(SHAPE, torch.float32, CPU, options, packed_projection=False)
        judge = Judge(subject, True, CPU)
        assert judge._guarded.arguments["rope"].cos.stride() == options["rope"].cos.stride()
        assert not judge.verdict(dispatch.find(OPS["attention"].backends, "sdpa")).wrong

    def test_dropout_is_not_calibrated(self):
        model = RegisterViT(dataclasses.replace(TINY, attn_drop=0.1)).train()
        found = subjects.of_model(model, torch.randn(2, 3, 28, 28))
        assert "attention" not in {subject.op for subject in found}

    def test_a_learnt_mask(self):
        """A model is met without gradients, so its call wants none of the mask; with them it is another call."""
        learnt = torch.zeros(1, 2, 21, 21, requires_grad=True)

        class Biased(nn.Module):
            def forward(self, x):
                return register_attention(x, x, x, attn_mask=learnt)

        (subject,) = subjects.of_model(Biased(), torch.randn(2, 2, 21, 16))
        assert subject.make(True).request.features == (features.ADDITIVE_MASK,)

    def test_a_pack_is_a_call_of_its_images(self):
        bounds = torch.tensor([0, 21, 30], dtype=torch.int32)
        x = torch.randn(1, 2, 30, 16)

        class Packed(nn.Module):
            def forward(self, x):
                return register_attention(x, x, x, cu_seqlens=bounds, max_seqlen=21)

        (subject,) = subjects.of_model(Packed(), x)
        assert (subject.tokens, subject.heads, subject.images) == (21, 4, 0)
        assert "packed images" in subject.size
        assert not Judge(subject, True, CPU).verdict(dispatch.find(OPS["attention"].backends, "sdpa")).wrong

    def test_tables_of_each_image_are_taken_apart(self):
        subject = of_attention()
        call = subject.make(False)
        angles = torch.rand(2, 16, 16)
        turned = dataclasses.replace(call, arguments={**call.arguments, "rope": Rope(angles.cos(), angles.sin())})
        assert torch.equal(subjects.part(turned, 1).arguments["rope"].cos, angles[1:].cos())


class TestCommand:
    def test_the_table(self, cache, takes, monkeypatch, capsys):
        monkeypatch.setattr(contests, "ORACLE", "nobody")
        takes(sdpa=3.0, reference=2.0)
        assert cli.main(["calibrate", "--shape", "2,3,21,16", "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        row = next(line for line in out.splitlines() if "2 x 3 heads, 21 tokens, head dim 16, fp32, separate  " in line)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == "attention"
        assert cells[2:4] == ["reference", "sdpa"]
        assert f"decided, in {cache}" in out
        assert "9/9" in err
        assert cli.main(["info"]) == 0
        shown = capsys.readouterr().out
        assert (
            f"calibrated, in {cache}:\n  attention, 21 tokens, 6 heads, float32, packed projection: reference (20"
            in shown
        )
        assert cli.main(["calibrate", "--clear"]) == 0
        assert capsys.readouterr().out == f"removed {cache}\n"
        assert cli.main(["info"]) == 0
        assert "calibrated: nothing; `vitreg calibrate` takes a minute" in capsys.readouterr().out

    def test_a_wrong_backend_fails_the_command(self, cache, takes, change_backends, monkeypatch, capsys):
        monkeypatch.setattr(contests, "ORACLE", "nobody")
        forward = dispatch.find(OPS["attention"].backends, "sdpa").forward
        change_backends("sdpa", op="attention", forward=lambda x: (r := forward(x))._replace(output=1.01 * r.output))
        assert cli.main(["calibrate", "--shape", "2,3,21,16", "--device", "cpu", "--dry-run"]) == 1
        assert "WRONG, and no default there any more: sdpa on attention" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--shape", "a,b"], "--shape takes B,H,N,D, four integers, not 'a,b'"),
            (["--shape", "1,2,3"], "a shape must be that of a query"),
            (["--batch", "3"], "--batch is of --model"),
            (["--device", "nowhere"], "cannot calibrate on device 'nowhere'"),
            (["--device", "cuda:97"], "cannot calibrate on device 'cuda:97'"),
            (["--model", "nowhere"], "--model takes timm:NAME, or a file"),
            (["--model", "timm:vit_tiny_patch16_224", "--rope"], "are of shapes; a model has its own"),
        ],
    )
    def test_what_it_cannot_do(self, cache, capsys, arguments, said):
        assert cli.main(["calibrate", "--device", "cpu", *arguments]) == 2
        assert said in capsys.readouterr().err

    def test_a_model_by_its_name(self, cache, capsys):
        pytest.importorskip("timm")
        arguments = ["calibrate", "--model", "timm:test_vit", "--batch", "2", "--device", "cpu", "--dtype", "bf16"]
        assert cli.main([*arguments, "--dry-run"]) == 0
        assert "2 x 2 heads, 101 tokens, head dim 32, bf16, packed projection, training" in capsys.readouterr().out

    def test_a_library_that_is_not_there(self, cache, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        assert cli.main(["calibrate", "--model", "timm:test_vit", "--device", "cpu"]) == 2
        assert "--model timm:NAME needs timm" in capsys.readouterr().err


class TestIdle:
    def test_a_busy_processor(self, monkeypatch):
        ticks = iter([(1000, 400), (1100, 480)])
        monkeypatch.setattr(idle, "_ticks", lambda: next(ticks))
        monkeypatch.setattr(idle.time, "sleep", lambda seconds: None)
        assert idle._of_processors() == pytest.approx(20.0)

    def test_this_machine_tells(self):
        if not os.path.exists("/proc/stat"):
            pytest.skip("no /proc/stat")
        total, idle_ticks = idle._ticks()
        assert total >= idle_ticks > 0


class _Opaque:
    """The same backend, as one of ours."""

    opaque = True

    def __init__(self, backend):
        self.name = backend.name


def _as_ours(attempted, call, *, ours):
    """What a peer raises is a refusal; here it is to be a fault."""
    return attempted(call, ours=True)
