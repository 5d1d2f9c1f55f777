"""The op behind sdpa's statistics by torch's own opcheck, where only sdpa serves the call; see tests/contract."""

from __future__ import annotations

import pytest
import torch
from cases import Spec, make_mask, make_qkv, views

from vitreg_kernels._native import library
from vitreg_kernels.ops.attention.statistics import LOGIT_STATISTICS


@pytest.mark.parametrize(
    ("spec", "outputs"),
    [
        *((Spec(), [name]) for name in LOGIT_STATISTICS),
        (Spec(), []),
        (Spec(dtype=torch.bfloat16, layout="sliced"), list(LOGIT_STATISTICS)),
        (Spec(dtype=torch.float64, layout="strided_channels"), list(LOGIT_STATISTICS)),
        (Spec(mask="bool"), list(LOGIT_STATISTICS)),
        (Spec(mask="additive"), list(LOGIT_STATISTICS)),
    ],
    ids=str,
)
def test_attention_statistics(spec, outputs):
    query, key, _ = views(make_qkv(spec))
    mask = make_mask(spec) if spec.mask else None
    arguments = (query, key, mask, None, spec.prefix, 0.25, " ".join(outputs))
    torch.library.opcheck(torch.ops.vitreg.attention_statistics, arguments)
    real = torch.ops.vitreg.attention_statistics(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake = torch.ops.vitreg.attention_statistics(*faked)
    for name, a, b in zip(outputs, real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name


@pytest.mark.skipif(not library.isa(), reason="; ".join(library.faults()))
def test_a_prefix_longer_than_the_image_is_refused_by_the_kernel_itself():
    """A graph of torch.export for any number of tokens does not ask before."""
    query, key, value = torch.randn(3, 1, 1, 4, 16)
    with pytest.raises(RuntimeError, match="as many tokens as the prefix has"):
        torch.ops.vitreg.attention_forward(
            query, key, value, None, None, None, False, None, 0, 5, 0.25, "prefix_attention", "cpu"
        )
