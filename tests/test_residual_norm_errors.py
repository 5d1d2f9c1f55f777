"""Bad input to residual_layer_norm: one clear sentence that says what was given and what was expected; nothing ran."""

from __future__ import annotations

import math

import pytest
import torch

from vitreg_kernels import UnsupportedError
from vitreg_kernels.functional import residual_layer_norm
from vitreg_kernels.ops.residual_norm.backends import BACKENDS

X = torch.zeros(2, 9, 8)
C = torch.zeros(8)
B = torch.ones(2)


@pytest.fixture(autouse=True)
def _nothing_runs(change_backends):
    def forward(inputs):
        pytest.fail("a backend ran")

    for backend in BACKENDS:
        change_backends(backend.name, op="residual_norm", forward=forward)


def case(name, error, message, **changes):
    return pytest.param({"x": X, "branch": X, "weight": C} | changes, error, message, id=name)


CASES = [
    case("2-d x", ValueError, ["x must be a [batch, tokens, channels] tensor", "[9, 8]"], x=X[0]),
    case("list", ValueError, ["x must be a [batch, tokens, channels] tensor", "a list"], x=[1.0]),
    case("integers", TypeError, ["x must be fp32, fp16, bf16 or fp64", "int64"], x=X.long()),
    case("no tokens", ValueError, ["at least one token and channel", "[2, 0, 8]"], x=X[:, :0]),
    case("no channels", ValueError, ["at least one token and channel", "[2, 9, 0]"], x=X[..., :0]),
    case("another branch", ValueError, ["branch must be [2, 9, 8]", "x's shape", "[2, 8, 8]"], branch=X[:, :8]),
    case("branch to broadcast", ValueError, ["branch must be [2, 9, 8]", "[1, 9, 8]"], branch=X[:1]),
    case("integer branch", TypeError, ["branch must be fp32, fp16 or bf16", "int64"], branch=X.long()),
    case("branch elsewhere", ValueError, ["branch must be [2, 9, 8] on cpu", "on meta"], branch=X.to("meta")),
    case("double branch", TypeError, ["branch must be fp32, fp16 or bf16, since x is not fp64"], branch=X.double()),
    case("single branch", TypeError, ["branch must be fp64, as x is", "float32"], x=X.double()),
    case("no weight", ValueError, ["weight must be [8]", "a NoneType"], weight=None),
    case("long weight", ValueError, ["weight must be [8]", "one number a channel", "[9]"], weight=torch.ones(9)),
    case("2-d bias", ValueError, ["bias must be [8]", "[1, 8]"], bias=C[None]),
    case("double bias", TypeError, ["bias must be", "float64"], bias=C.double()),
    case("bias of RMSNorm", ValueError, ["RMSNorm has no bias", "rms=False"], bias=C, rms=True),
    case("number for layer_scale", ValueError, ["layer_scale must be [8]", "a float"], layer_scale=0.1),
    case("layer_scale alone", ValueError, ["layer_scale", "without the branch"], branch=None, layer_scale=C),
    case("drop_path alone", ValueError, ["drop_path", "without the branch"], branch=None, drop_path=B),
    case("probability", ValueError, ["drop_path must be [2]", "one factor a sample", "a float"], drop_path=0.1),
    case("timm's drop_path", ValueError, ["drop_path must be [2]", "[2, 1, 1]"], drop_path=B[:, None, None]),
    case("drop_path of booleans", TypeError, ["drop_path must be", "bool"], drop_path=B.bool()),
    case("drop_path to learn", ValueError, ["no gradient", "detach"], drop_path=torch.ones(2, requires_grad=True)),
    case("rms is no flag", TypeError, ["rms must be True", "'rms'"], rms="rms"),
    case("negative eps", ValueError, ["eps must be a finite number of at least 0", "-1e-06"], eps=-1e-6),
    case("infinite eps", ValueError, ["eps must be a finite number", "inf"], eps=math.inf),
    case("eps of none", ValueError, ["eps must be a finite number", "None"], eps=None),
    case("unknown backend", ValueError, ["unknown backend 'sdpa'", "'triton', 'cpu', 'composite'"], backend="sdpa"),
    case("backend that cannot", UnsupportedError, ["'triton'", "not float64"],
         x=X.double(), branch=None, weight=C.double(), backend="triton"),
    case("too wide", UnsupportedError, ["takes channel counts 1 to 4096, not 4097"],
         x=torch.zeros(1, 1, 4097), branch=None, weight=torch.zeros(4097), backend="triton"),
    case("another device", UnsupportedError, ["'cpu'", "runs on cpu, not on meta"], backend="cpu",
         x=X.to("meta"), branch=None, weight=C.to("meta")),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_refused_in_one_sentence(call, error, message):
    with pytest.raises(error) as raised:
        residual_layer_norm(**call)
    text = str(raised.value)
    for fragment in message:
        assert fragment in text
    assert "\n" not in text
    assert not text.endswith((".", " ")), "error messages end like Python's own"
    assert len(text) < 500
