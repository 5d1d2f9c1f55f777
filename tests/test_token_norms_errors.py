"""Bad input to token_norms and its kin: one clear sentence that says what was given and expected; nothing ran."""

from __future__ import annotations

import math

import pytest
import torch

from vitreg_kernels import NormDistribution, TokenLayout, TokenNormStats, UnsupportedError
from vitreg_kernels.dispatch import Request
from vitreg_kernels.functional import token_norm_stats, token_norms
from vitreg_kernels.ops.token_norms import features
from vitreg_kernels.ops.token_norms.api import accumulate
from vitreg_kernels.ops.token_norms.backends import BACKENDS

X = torch.zeros(2, 9, 8)
NORMS = torch.zeros(2, 9)
LAYOUT = TokenLayout(num_registers=4)
INTO = NormDistribution.zeros((3,), "cpu")


@pytest.fixture(autouse=True)
def _nothing_runs(change_backends):
    def ran(*arguments):
        pytest.fail("a backend ran")

    for backend in BACKENDS:
        change_backends(backend.name, op="token_norms", forward=ran, accumulate=ran)


def assert_refused(function, arguments, error, message):
    with pytest.raises(error) as raised:
        function(**arguments)
    text = str(raised.value)
    for fragment in message:
        assert fragment in text
    assert "\n" not in text
    assert not text.endswith((".", " ")), "error messages end like Python's own"
    assert len(text) < 500


def case(name, error, message, **changes):
    return pytest.param(changes, error, message, id=name)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        case("2-d", ValueError, ["x must be a [batch, tokens, channels] tensor", "[2, 9]"], x=NORMS),
        case("list", ValueError, ["x must be a [batch, tokens, channels] tensor", "a list"], x=[1.0]),
        case("integers", TypeError, ["x must be fp32, fp16, bf16 or fp64", "int64"], x=X.long()),
        case("no tokens", ValueError, ["at least one token and channel", "[2, 0, 8]"], x=X[:, :0]),
        case("no channels", ValueError, ["at least one token and channel", "[2, 9, 0]"], x=X[..., :0]),
        case("unknown backend", ValueError, ["unknown backend 'sdpa'", "'triton', 'cpu', 'composite'"],
             backend="sdpa"),
        case("a backend that cannot", UnsupportedError, ["'triton'", "not float64"], x=X.double(), backend="triton"),
        case("too wide", UnsupportedError, ["takes channel counts 1 to 4096, not 4097"],
             x=torch.zeros(1, 1, 4097), backend="triton"),
        case("another device", UnsupportedError, ["'cpu'", "runs on cpu, not on meta"], x=X.to("meta"),
             backend="cpu"),
    ],
)  # fmt: skip
def test_norms(changes, error, message):
    assert_refused(token_norms, {"x": X} | changes, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        case("1-d", ValueError, ["x must be a [batch, tokens, channels] tensor", "[9]"], x=NORMS[0]),
        case("integer norms", TypeError, ["norms must be fp32, fp16, bf16 or fp64", "int64"], x=NORMS.long()),
        case("layout of numbers", TypeError, ["layout must be a TokenLayout", "a int"], layout=5),
        case("too few tokens", ValueError, ["x has 4 tokens", "4 register tokens"], x=X[:, :4]),
        case("another length", ValueError, ["x has 9 tokens", "5 patches"], layout=TokenLayout(5, num_registers=4)),
        case("no tokens", ValueError, ["at least one token and channel", "[2, 0]"], x=NORMS[:, :0]),
        case("unknown backend", ValueError, ["unknown backend 'sdpa'"], backend="sdpa"),
        case("backend for norms", ValueError, ["unknown backend 'sdpa'"], x=NORMS, backend="sdpa"),
    ],
)
def test_statistics(changes, error, message):
    assert_refused(token_norm_stats, {"x": X, "layout": LAYOUT} | changes, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        case("tokens", ValueError, ["norms must be a [batch, tokens] tensor", "[2, 9, 8]"], norms=X),
        case("layout of None", TypeError, ["layout must be a TokenLayout", "NoneType"], layout=None),
        case("a tuple", TypeError, ["into must be a NormDistribution", "a tuple"], into=tuple(INTO)),
        case("of layers", ValueError, ["into.histogram must be [3, 2048] int64 on cpu", "[2, 3, 2048]"],
             into=NormDistribution.zeros((2, 3), "cpu")),
        case("fp32 sums", ValueError, ["into.sums must be [3, 2] float64", "float32", "NormDistribution.zeros"],
             into=INTO._replace(sums=INTO.sums.float())),
        case("two groups", ValueError, ["into.nonfinite must be [3, 2] int64", "[2, 2]"],
             into=INTO._replace(nonfinite=INTO.nonfinite[:2])),
        case("elsewhere", ValueError, ["into.extremes must be [3, 2] float32 on cpu", "on meta"],
             into=INTO._replace(extremes=INTO.extremes.to("meta"))),
        case("unknown backend", ValueError, ["unknown backend 'sdpa'"], backend="sdpa"),
    ],
)  # fmt: skip
def test_accumulation(changes, error, message):
    before = [x.clone() for x in INTO]
    assert_refused(accumulate, {"norms": NORMS, "layout": LAYOUT, "into": INTO} | changes, error, message)
    assert all(torch.equal(x, y) for x, y in zip(INTO, before, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norm": 150.0, "median": 3.0}, ["one threshold", "norm=150.0 and median=3.0"]),
        ({"median": -1.0}, ["median must be a finite number of at least 0", "-1.0"]),
        ({"norm": math.nan}, ["norm must be a finite number", "nan"]),
        ({"mad": math.inf}, ["mad must be a finite number", "inf"]),
        ({"norm": "150"}, ["norm must be a finite number", "'150'"]),
        ({"mad": True}, ["mad must be a finite number", "True"]),
        ({"percentile": 101.0}, ["a percentile must be from 0 to 100", "101.0"]),
    ],
    ids=str,
)
def test_outliers(given, message):
    assert_refused(TokenNormStats.of_stacked(INTO).outliers, given, ValueError, message)


def test_percentile():
    assert_refused(INTO.percentile, {"q": -0.5}, ValueError, ["a percentile must be from 0 to 100", "-0.5"])


def test_a_device_without_double_precision_can_take_norms_but_not_count_them():
    backends = [backend for backend in BACKENDS if "mps" in backend.requirements.devices]
    assert backends
    for backend in backends:
        request = Request("token_norms", "mps", 0, torch.float32)
        assert not backend.reasons_against(request)
        (reason,) = backend.reasons_against(request._replace(features=(features.STATISTICS,)))
        assert "fp64, which MPS does not have" in reason
