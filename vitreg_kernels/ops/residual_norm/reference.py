"""The specification of the op: what every backend must compute, in plain torch, readable in one sitting.

Differentiable by autograd. Run in fp64 it gives what the accuracy rule takes for exact; run in the inputs' own dtype
it is the eager formula a backend's error is held against.
"""

from __future__ import annotations

import torch

from .types import NormInputs, ResidualNorm


def residual_layer_norm(inputs: NormInputs) -> ResidualNorm:
    """``x + drop_path * layer_scale * branch``, normalized, and the length of each of its tokens.

    LayerNorm (Ba et al., arXiv 1607.06450, eq. 4) or RMSNorm (Zhang and Sennrich, arXiv 1910.07467, eq. 4) of the
    residual as it is stored; LayerScale as in Touvron et al. (arXiv 2103.17239, eq. 4), stochastic depth as in Huang et
    al. (arXiv 1603.09382). The residual is made in the inputs' dtype; statistics and normalization in fp32 (fp64 for
    fp64).
    """
    residual = inputs.x
    if inputs.branch is not None:
        update = inputs.branch
        if inputs.layer_scale is not None:
            update = update * inputs.layer_scale
        if inputs.drop_path is not None:
            update = update * inputs.drop_path[:, None, None]
        residual = (residual + update).to(inputs.x.dtype).contiguous()

    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    centred = wide if inputs.rms else wide - wide.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + inputs.eps).rsqrt()
    normalized = centred * rstd * inputs.weight
    if inputs.bias is not None:
        normalized = normalized + inputs.bias
    token_norms = wide.detach().square().sum(-1).sqrt()
    return ResidualNorm(residual, normalized.to(inputs.dtype).contiguous(), token_norms)
