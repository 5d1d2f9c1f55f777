"""Bad input to assemble_tokens: one clear sentence that says what was given and what was expected; nothing ran."""

from __future__ import annotations

import pytest
import torch

from vitreg_kernels import UnsupportedError
from vitreg_kernels.functional import assemble_tokens
from vitreg_kernels.ops.assemble.backends import BACKENDS

X = torch.zeros(2, 9, 8)
CLS = torch.zeros(1, 1, 8)
REGISTERS = torch.zeros(1, 4, 8)


def rows(number):
    return torch.zeros(1, number, 8)


@pytest.fixture(autouse=True)
def _nothing_runs(change_backends):
    def forward(inputs):
        pytest.fail("a backend ran")

    for backend in BACKENDS:
        change_backends(backend.name, op="assemble", forward=forward)


def case(name, error, message, **changes):
    call = {"patches": X, "cls_token": CLS, "register_tokens": REGISTERS, "pos_embed": rows(14)} | changes
    return pytest.param(call, error, message, id=name)


ROWS = ["pos_embed must have 9 rows (patches), 10 (CLS tokens and patches) or 14 (CLS tokens, registers and patches)"]

CASES = [
    case("2-d patches", ValueError, ["patches must be a [batch, patches, channels] tensor", "[9, 8]"], patches=X[0]),
    case("image", ValueError, ["patches must be a [batch, patches, channels]", "[2, 8, 3, 3]", "transpose(1, 2)"],
         patches=torch.zeros(2, 8, 3, 3)),
    case("list", ValueError, ["patches must be a [batch, patches, channels] tensor", "a list"], patches=[1.0]),
    case("integers", TypeError, ["patches must be fp32, fp16, bf16 or fp64", "int64"], patches=X.long()),
    case("no patches", ValueError, ["at least one patch and channel", "[2, 0, 8]"], patches=X[:, :0]),
    case("no channels", ValueError, ["at least one patch and channel", "[2, 9, 0]"], patches=X[..., :0]),
    case("a CLS token an image", ValueError, ["cls_token must be [1, tokens, 8] on cpu", "one for all", "[2, 1, 8]"],
         cls_token=CLS.expand(2, -1, -1)),
    case("2-d cls_token", ValueError, ["cls_token must be [1, tokens, 8]", "[1, 8]"], cls_token=CLS[0]),
    case("narrow registers", ValueError, ["register_tokens must be [1, tokens, 8]", "[1, 4, 7]"],
         register_tokens=REGISTERS[..., 1:]),
    case("list of registers", ValueError, ["register_tokens must be [1, tokens, 8]", "a list"], register_tokens=[4.0]),
    case("registers elsewhere", ValueError, ["register_tokens must be [1, tokens, 8] on cpu", "on meta"],
         register_tokens=REGISTERS.to("meta")),
    case("integer registers", TypeError, ["register_tokens must be fp32", "int64"], register_tokens=REGISTERS.long()),
    case("integer cls_token", TypeError, ["cls_token must be fp32", "int64"], cls_token=CLS.long()),
    case("2-d pos_embed", ValueError, ["pos_embed must be [1, rows, 8]", "[14, 8]"], pos_embed=rows(14)[0]),
    case("a pos_embed an image", ValueError, ["pos_embed must be [1, rows, 8]", "one for all images", "[2, 14, 8]"],
         pos_embed=rows(14).expand(2, -1, -1)),
    case("integer pos_embed", TypeError, ["pos_embed must be fp32", "int64"], pos_embed=rows(14).long()),
    case("another resolution", ValueError, [*ROWS, "got [1, 197, 8]", "interpolate"], pos_embed=rows(197)),
    case("rows of some registers", ValueError, [*ROWS, "got [1, 12, 8]"], pos_embed=rows(12)),
    case("no row", ValueError, [*ROWS, "got [1, 0, 8]"], pos_embed=rows(0)),
    case("a row for no CLS token", ValueError, ["9 rows (patches), 9 (CLS tokens and patches) or 13", "[1, 10, 8]"],
         cls_token=None, pos_embed=rows(10)),
    case("rows for no registers", ValueError, ["9 rows (patches), 10", "or 10", "[1, 14, 8]"], register_tokens=None),
    case("unknown backend", ValueError, ["unknown backend 'sdpa'", "'triton', 'cpu', 'composite'"], backend="sdpa"),
    case("backend that cannot", UnsupportedError, ["'triton'", "not float64"], cls_token=CLS.double(),
         backend="triton"),
    case("another device", UnsupportedError, ["'cpu'", "runs on cpu, not on meta"], backend="cpu",
         patches=X.to("meta"), cls_token=None, register_tokens=None, pos_embed=None),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_refused_in_one_sentence(call, error, message):
    with pytest.raises(error) as raised:
        assemble_tokens(**call)
    text = str(raised.value)
    for fragment in message:
        assert fragment in text
    assert "\n" not in text
    assert not text.endswith((".", " ")), "error messages end like Python's own"
    assert len(text) < 500
