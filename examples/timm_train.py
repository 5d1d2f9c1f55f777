"""timm's own train.py, and every option of it, with attention on this library's kernels: give its path first.

python examples/timm_train.py pytorch-image-models/train.py IMAGES --model vit_base_patch16_224 --amp
torchrun --nproc-per-node 8 examples/timm_train.py pytorch-image-models/train.py IMAGES --model vit_base_patch16_224
"""

from __future__ import annotations

import functools
import runpy
import sys

import timm.models
from torch import nn

from vitreg_kernels import patch

timms_own = timm.models.create_model


@functools.wraps(timms_own)
def create_model(*args: object, **options: object) -> nn.Module:
    """timm's model, patched before the script moves, compiles or wraps it."""
    model = timms_own(*args, **options)
    print(patch(model, level="block"))
    return model


if len(sys.argv) == 1:
    raise SystemExit(__doc__)
timm.models.create_model = create_model  # which the script imports by this name
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
