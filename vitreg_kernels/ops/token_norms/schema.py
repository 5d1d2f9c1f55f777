"""The ops' schemas and fakes (shapes, dtypes and strides without data). Imports torch only.

Both are opaque to torch.compile and take detached inputs. The second changes a distribution, whose leading shape is
``[3]`` for the groups, in place. The backend is a string, chosen before tracing.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("vitreg", "FRAGMENT")

LIBRARY.define("token_norms(Tensor x, str backend) -> Tensor")
LIBRARY.define(
    "accumulate_token_norms(Tensor norms, int num_cls_tokens, int num_registers, Tensor(a!) histogram, "
    "Tensor(b!) sums, Tensor(c!) extremes, Tensor(d!) nonfinite, bool skip_in_backward, str backend) -> ()"
)


@torch.library.register_fake("vitreg::token_norms", lib=LIBRARY)
def _(x, backend):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.register_fake("vitreg::accumulate_token_norms", lib=LIBRARY)
def _(norms, num_cls_tokens, num_registers, histogram, sums, extremes, nonfinite, skip_in_backward, backend):  # noqa: ANN001, ANN202
    pass
