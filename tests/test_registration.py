"""The opaque op of the plain process by torch's own opcheck: schema, fake, autograd registration, dynamic shapes."""

from __future__ import annotations

import pytest
import torch
from cases import Spec, make_mask, make_options, make_qkv, views

from vitreg_kernels.ops.attention.statistics import LOGIT_STATISTICS


@pytest.mark.parametrize("outputs", [*([name] for name in LOGIT_STATISTICS), list(LOGIT_STATISTICS), []], ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        Spec(),
        Spec(dtype=torch.bfloat16, layout="sliced"),
        Spec(dtype=torch.float64, layout="strided_channels"),
        Spec(prefix=0),
        Spec(mask="key_padding", seed=1),
        Spec(mask="bool"),
        Spec(mask="additive"),
        Spec(batch=1, lengths=(9, 12)),
    ],
    ids=str,
)
def test_attention_statistics(spec, outputs):
    query, key, _ = views(make_qkv(spec))
    mask = make_mask(spec) if spec.mask else None
    cu_seqlens = make_options(spec).get("cu_seqlens")
    arguments = (query, key, mask, cu_seqlens, spec.prefix, 0.25, outputs)
    torch.library.opcheck(torch.ops.vitreg.attention_statistics, arguments)
    real = torch.ops.vitreg.attention_statistics(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake = torch.ops.vitreg.attention_statistics(*faked)
    for name, a, b in zip(LOGIT_STATISTICS, real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name


def test_ops_refuse_nothing_silently():
    """Every op has a fake and one kernel for all devices, none an autograd formula of its own."""
    for name in ("attention_forward", "attention_backward", "attention_backward_qkv", "attention_statistics"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vitreg::{name}", "CompositeExplicitAutograd")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"vitreg::{name}", "Autograd")
        assert torch._library.simple_registry.singleton.find(f"vitreg::{name}").fake_impl.kernel is not None
