"""Calls of the ops around attention to check on a GPU: residual norms, token norms, their statistics, assembly.

Each is held against the op's reference in fp64, as accurately as the reference in the call's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.gpu import on_gpus
from benchmarks.gpu.poison import guarded
from benchmarks.peers import Tensors
from benchmarks.results import Errors
from benchmarks.shapes import NUM_PREFIX_TOKENS
from vitreg_kernels import TokenLayout, accuracy, functional
from vitreg_kernels._runtime.dispatch import Backend
from vitreg_kernels.ops.assemble.backends import BACKENDS as ASSEMBLE
from vitreg_kernels.ops.residual_norm.backends import BACKENDS as RESIDUAL_NORM
from vitreg_kernels.ops.token_norms.backends import BACKENDS as TOKEN_NORMS

_LAYOUT = TokenLayout(num_registers=NUM_PREFIX_TOKENS - 1)


class Op(NamedTuple):
    """One op.

    Attributes:
        name: of its folder.
        backends: its registry.
        function: ``function(backend=, **arguments)`` gives tensors by name.
    """

    name: str
    backends: Sequence[Backend]
    function: Callable[..., Tensors]


class Call(NamedTuple):
    """One call, which must not share its name with another of the op.

    Attributes:
        op, name: what it is.
        arguments: all but the backend.
        terms: K of the accuracy rule.
    """

    op: Op
    name: str
    arguments: dict[str, Any]
    terms: int

    def run(self, backend: str) -> Tensors:
        """Every output, and the gradient of each floating-point argument of an op that has gradients."""
        leaves = {
            name: x.detach().requires_grad_(name != "drop_path")
            for name, x in self.arguments.items()
            if isinstance(x, Tensor)
        }
        outputs = self.op.function(**{**self.arguments, **leaves}, backend=backend)
        found = {name: x.detach() if x.is_floating_point() else x.double() for name, x in outputs.items()}
        ends = [x for x in outputs.values() if x.requires_grad]
        starts = {name: x for name, x in leaves.items() if x.requires_grad}
        if ends:
            generator = torch.Generator().manual_seed(0)
            upstream = [guarded(torch.randn(x.shape, generator=generator).to(x)) for x in ends]
            gradients = torch.autograd.grad(ends, list(starts.values()), upstream)
            found |= {f"grad_{name}": g for name, g in zip(starts, gradients, strict=True)}
        return found

    def guarded(self) -> Call:
        """The same call with its tensors between guard bands."""
        return self._with(guarded)

    def yardstick(self) -> tuple[Tensors, Tensors]:
        """The exact tensors, and those of the same-dtype formula."""
        return self._with(Tensor.double).run("reference"), self.run("reference")

    def errors(self, found: Tensors, yardstick: tuple[Tensors, Tensors]) -> dict[str, Errors]:
        """What a backend gave, judged."""
        exact, rounded = yardstick
        return {
            name: results.errors(accuracy.compare(x, exact[name], rounded[name], terms=self.terms))
            for name, x in found.items()
        }

    def _with(self, change: Callable[[Tensor], Tensor]) -> Call:
        arguments = {name: change(x) if isinstance(x, Tensor) else x for name, x in self.arguments.items()}
        return self._replace(arguments=arguments)


def calls(dtype: torch.dtype, device: torch.device, *, dry: bool) -> Iterator[Call]:
    """Calls of each op in a dtype: of all kinds at once in a dry run, and else each kind at the sizes of ViTs."""
    generator = torch.Generator(device).manual_seed(2)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def permuted(*shape: int) -> Tensor:
        """Dense, as a convolution's ``[B, C, N]`` is."""
        batch, tokens, channels = shape
        return normal(batch, channels, tokens).transpose(1, 2)

    tiny = (2, 9, 48)
    wide = [(4, 261, channels) for channels in (384, 768, 1280, 1536, 4096)]
    for shape in [tiny] if dry else [(64, 261, 1024), *wide, (3, 54, 100)]:
        yield _residual_norm(_size(shape), normal(*shape), normal(*shape), normal)
        yield Call(_TOKEN_NORMS, _size(shape), {"x": normal(*shape)}, terms=shape[2])

    shape = tiny if dry else (4, 261, 1024)
    whole = _residual_norm(f"{_size(shape)}, permuted", permuted(*shape), permuted(*shape), normal)
    yield whole
    yield Call(_TOKEN_NORMS, whole.name, {"x": permuted(*shape)}, terms=shape[2])
    without_bias = {name: x for name, x in whole.arguments.items() if name != "bias"}
    yield whole._replace(name=f"{_size(shape)}, RMSNorm", arguments=without_bias | {"rms": True})
    alone = {name: whole.arguments[name] for name in ("x", "weight", "bias")}
    yield whole._replace(name=f"{_size(shape)}, no branch", arguments=alone)
    if dtype != torch.float32:
        stream = normal(*shape, dtype=torch.float32)
        yield _residual_norm(f"{_size(shape)}, fp32 stream", stream, normal(*shape), normal)

    norms = 30 * (1 + normal(*shape[:2], dtype=torch.float32).square())
    norms[0, :3], norms[-1, -1] = torch.tensor([math.nan, math.inf, 0.0], device=device), 1e30
    yield Call(_STATISTICS, f"{shape[0]} x {shape[1]}", {"norms": norms}, terms=norms.numel())

    batch, tokens, channels = shape
    patches, registers = tokens - NUM_PREFIX_TOKENS, NUM_PREFIX_TOKENS - 1
    for position, rows in {"all tokens": tokens, "CLS and patches": 1 + patches, "patches": patches}.items():
        parameters = {
            "cls_token": normal(1, 1, channels),
            "register_tokens": normal(1, registers, channels),
            "pos_embed": normal(1, rows, channels),
        }
        arguments = {"patches": permuted(batch, patches, channels), **parameters}
        yield Call(_ASSEMBLE, f"{_size(shape)}, positions of {position}", arguments, terms=batch)


def _residual_norm(name: str, x: Tensor, branch: Tensor, normal: Callable[..., Tensor]) -> Call:
    """With everything that a call may have."""
    batch, tokens, channels = x.shape
    parameters = {name: normal(channels) for name in ("layer_scale", "weight", "bias")}
    kept = (torch.arange(batch, device=x.device) % 3 > 0).to(branch.dtype) / 0.7
    arguments = {"x": x, "branch": branch, "drop_path": kept, **parameters}
    return Call(_RESIDUAL_NORM, name, arguments, terms=channels + batch * tokens)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _residual_layer_norm(**arguments: Any) -> Tensors:
    return functional.residual_layer_norm(**arguments)._asdict()


def _token_norms(x: Tensor, backend: str) -> Tensors:
    return {"token_norms": functional.token_norms(x, backend=backend)}


def _statistics(norms: Tensor, backend: str) -> Tensors:
    stats = functional.token_norm_stats(norms, _LAYOUT, backend=backend)._asdict()
    return {f"{group} {name}": x for group, its in stats.items() for name, x in its._asdict().items()}


def _assemble(**arguments: Any) -> Tensors:
    return {"tokens": functional.assemble_tokens(**arguments)}


_RESIDUAL_NORM = Op("residual_norm", on_gpus(RESIDUAL_NORM), _residual_layer_norm)
_TOKEN_NORMS = Op("token_norms", on_gpus(TOKEN_NORMS), _token_norms)
_STATISTICS = Op("token_norm_stats", on_gpus(TOKEN_NORMS), _statistics)
_ASSEMBLE = Op("assemble", on_gpus(ASSEMBLE), _assemble)
OPS = (_RESIDUAL_NORM, _TOKEN_NORMS, _STATISTICS, _ASSEMBLE)
