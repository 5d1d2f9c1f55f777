"""The command line as a user meets it: `vitreg info`, and a `vitreg check` that fails when a kernel is wrong."""

from __future__ import annotations

import pytest
import torch

from vitreg_kernels import check, cli
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.backends import BACKENDS, sdpa


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(dtype, device):
        yield check.Case("21 tokens", torch.randn(1, 21, 3, 2, 16, device=device).to(dtype), {"num_prefix_tokens": 5})
        keep = torch.rand(1, 1, 1, 17, device=device) > 0.3
        yield check.Case(
            "17 tokens, padded", torch.randn(1, 17, 3, 2, 16, device=device).to(dtype), {"attn_mask": keep}
        )

    monkeypatch.setattr(check, "cases", cases)


def test_info_names_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in (torch.__version__, *(b.NAME for b in BACKENDS), *features.ALL):
        assert word in shown


def test_support_table_says_what_is_declared() -> None:
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in cli.support_table().split("\n")
    ]
    assert header[1:] == [b.NAME for b in BACKENDS]
    by_feature = {row[0]: row[1:] for row in rows}
    for feature in features.ALL:
        assert by_feature[feature] == ["yes" if feature in b.REQUIREMENTS.features else "no" for b in BACKENDS]


def test_support_tables_of_the_other_ops(capsys: pytest.CaptureFixture[str]) -> None:
    header, _, *rows = cli.support_table("residual norm").split("\n")
    names = ["triton", "native", "composite", "reference"]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["residual norm", *names]
    sizes = ["channels", "1-4096", "any", "any", "any"]
    assert any([cell.strip() for cell in row.strip("|").split("|")] == sizes for row in rows)
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for op in ("attention", "residual norm", "token norms", "assemble"):
        assert cli.support_table(op) in shown


@pytest.mark.usefixtures("few_cases")
def test_check_passes_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "FAIL" not in shown
    backends = check.usable_backends("cpu")
    assert {"sdpa", "reference"} <= set(backends)
    # Two cases in three dtypes a backend, less what a backend does not serve.
    assert f"{6 * len(backends) - shown.count('not served')} passed, 0 failed" in shown


def broken_output(result):
    return result._replace(output=result.output * 1.02)


def broken_gradient(result):
    return result._replace(output=result.output + 0.02 * (result.output - result.output.detach()))


def broken_statistic(result):
    return result._replace(statistics=result.statistics._replace(lse=result.statistics.lse + 1e-3))


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(
    ("broken", "named"),
    [(broken_output, "output"), (broken_gradient, "grad_query"), (broken_statistic, "lse")],
)
def test_check_fails_when_a_backend_is_wrong(broken, named, monkeypatch, capsys) -> None:
    right = sdpa.forward
    monkeypatch.setattr(sdpa, "forward", lambda inputs: broken(right(inputs)))
    assert cli.main(["check", "--device", "cpu", "--backend", "sdpa"]) == 1
    failing = [line for line in capsys.readouterr().out.split("\n") if "FAIL" in line]
    assert failing
    assert all(named in line for line in failing if "fp32" in line)


def without_statistics(result):
    return result._replace(statistics=type(result.statistics)())


def statistics_in_half(result):
    return result._replace(statistics=type(result.statistics)(*(x.half() for x in result.statistics)))


def raising(result):
    raise RuntimeError("an illegal memory access")


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(
    ("broken", "said"),
    [(without_statistics, "were asked for"), (statistics_in_half, "dtype"), (raising, "an illegal memory access")],
)
def test_check_fails_when_a_backend_does_not_answer_as_asked(broken, said, monkeypatch, capsys) -> None:
    right = sdpa.forward
    monkeypatch.setattr(sdpa, "forward", lambda inputs: broken(right(inputs)))
    assert cli.main(["check", "--device", "cpu", "--backend", "sdpa"]) == 1
    shown = capsys.readouterr().out
    assert "0 passed, 6 failed" in shown
    assert said in shown


@pytest.mark.parametrize("device", ["tape", "meta", *(() if torch.cuda.is_available() else ("cuda",))])
def test_check_refuses_a_device_that_is_not_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--device", device]) == 2
    assert f"cannot check on device '{device}'" in capsys.readouterr().err


def test_check_refuses_an_unknown_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--backend", "flash"]) == 2
    assert "unknown backend 'flash'" in capsys.readouterr().err


def test_check_that_checks_nothing_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that serves no case here, such as xformers on a CPU, does not pass."""
    assert cli.main(["check", "--device", "cpu", "--backend", "xformers"]) == 1
    assert "not served: runs on cuda, not on cpu" in capsys.readouterr().out
