"""``examples/train.py``: it learns, patched as unpatched; resumed or by two processes it is the same training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from train_cases import CUT_AFTER, cut, example, train

from vitreg_kernels.monitor import read_csv

RANKS = Path(__file__).with_name("train_ranks.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder, losses and accuracy of a training by one process."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(folder)


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flat(state):
    return [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]


def test_patched_learns_as_unpatched(tmp_path):
    """And all learn."""
    # The mean of the patches, instead of the CLS token, learns within a few steps.
    model = ["depth=2", "embed_dim=64", "num_heads=2", "class_token=False", "no_embed_class=True", "global_pool=avg"]
    options = ("--steps=50", "--batch-size=32", "--report-every=5", "--save-every=50", "--model-kwargs", *model)
    levels = ("off", "attention", "block")
    off, attention, block = (train(tmp_path / level, *options, f"--patch={level}")[0] for level in levels)
    assert attention == pytest.approx(off, rel=1e-3)
    assert block == pytest.approx(off, rel=1e-3)
    assert attention != off
    losses = list(off.values())
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])


def test_bf16(tmp_path):
    """The losses of fp32, nearly."""
    half, full = (train(tmp_path / name, *options)[0] for name, options in (("bf16", ["--bf16"]), ("fp32", [])))
    assert half == pytest.approx(full, rel=2e-2)
    assert half != full


def test_resumed_is_the_same_training(tmp_path):
    expected = train(tmp_path / "whole", random=True)
    cut(tmp_path / "cut", random=True)
    saved = state_of(tmp_path / "cut")
    assert saved["step"] < CUT_AFTER
    assert saved["norms"][0]["histogram"].any()  # counted since the report before
    losses, accuracy = train(tmp_path / "cut", "--resume", random=True)
    assert losses == {step: loss for step, loss in expected[0].items() if step > saved["step"]}
    assert accuracy == expected[1]
    for part in ("model", "optimizer"):
        resumed, whole = (state_of(tmp_path / name)[part] for name in ("cut", "whole"))
        torch.testing.assert_close(flat(resumed), flat(whole), rtol=0, atol=0)
    assert (tmp_path / "cut" / "norms.csv").read_text() == (tmp_path / "whole" / "norms.csv").read_text()


def test_two_processes_train_as_one(whole, tmp_path):
    folder, *expected = whole
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, RANKS, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    found["fsdp2, resumed by one process"] = train(tmp_path / "cut", "--resume")
    assert list(found) == ["ddp", "fsdp2", "fsdp2, resumed", "fsdp2, resumed by one process"]
    for name, (losses, accuracy) in found.items():
        later = {step: loss for step, loss in expected[0].items() if step > 5 or "resumed" not in name}
        assert {int(step): loss for step, loss in losses.items()} == pytest.approx(later, rel=1e-4), name
        assert accuracy == pytest.approx(expected[1], abs=2 / 359), name
    for name in ("ddp", "fsdp2", "resumed"):
        counts, theirs = ([row.count for _, row in read_csv(f / "norms.csv")] for f in (folder, tmp_path / name))
        assert theirs == counts, name


def test_norms_are_written_and_drawn(whole):
    folder = whole[0]
    rows = {(step, row.layer, row.group): row.count for step, row in read_csv(folder / "norms.csv")}
    tokens = {"cls": 1, "registers": 4, "patches": 16}
    assert rows == {
        (step, f"blocks.{i}", group): 3 * 16 * count
        for step in (3, 6, 9)
        for i in range(2)
        for group, count in tokens.items()
    }
    assert (folder / "norms.png").stat().st_size > 10_000


def test_own_images(tmp_path):
    """Of folders; augmentation depends on the position in the training, whoever reads them."""
    from PIL import Image

    for i in range(8):
        path = tmp_path / "images" / ("train" if i < 6 else "val") / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((70, 60), 50.0).convert("RGB").save(path)
    learnt, held_out, classes = example.folders(str(tmp_path / "images"), 32)
    assert (len(learnt), len(held_out), classes) == (6, 2, 2)
    stream = example.Stream(learnt, seed=0)
    alone = [stream[i] for i in range(12)]
    read = list(torch.utils.data.DataLoader(stream, 1, sampler=range(3, 12), num_workers=1))
    torch.testing.assert_close(torch.cat([x for x, _ in read]), torch.stack([x for x, _ in alone[3:]]), rtol=0, atol=0)
    assert not any(torch.equal(alone[i][0], alone[j][0]) for i in range(12) for j in range(i))
    losses, _ = train(tmp_path / "run", f"--data={tmp_path / 'images'}", "--steps=1")
    assert list(losses) == [1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model=resnet18"], "resnet18 cannot be trained here: .*unexpected keyword argument 'img_size'"),
        (["--model=resnet18", "--model-kwargs", "x=1"], "resnet18 cannot be trained here: .*"),
        (["--model=vit_nope"], r"vit_nope cannot be trained here: Unknown model \(vit_nope\)"),
        (["--model-kwargs", "depth"], "--model-kwargs takes NAME=VALUE, with = and no spaces around it"),
        (["--steps=0"], "--steps must be at least 1, not 0"),
        (["--accumulate=3"], "--batch-size 16 must be a multiple of processes x pieces, 3"),
        (["--parallel=ddp"], "--parallel needs torchrun --nproc-per-node N before this script"),
        (["--data=nowhere"], "--data nowhere must hold folders train and val, and these one for each class"),
        (["--resume"], "there is no .*checkpoint.pt to --resume"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(options, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train(tmp_path, *options)
    said = str(end.value) if isinstance(end.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(f"{sentence}$", said), said


def test_another_run_is_not_resumed(whole):
    folder = whole[0]
    with pytest.raises(SystemExit, match="of a run with seed=0, not 1: it cannot be resumed so"):
        train(folder, "--resume", "--seed=1")
    with pytest.raises(SystemExit, match="of the last step, 9: nothing is left to do"):
        train(folder, "--resume")
    with pytest.raises(SystemExit):
        train(folder)
