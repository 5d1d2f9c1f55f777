"""A call on DTensors: every device attends for its own images and heads, as in a plain call.

Nothing is sent between devices but what the query's placements ask for: images and heads know nothing of each other.
A query that is split otherwise, or into uneven parts, is gathered first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from ...errors import UnsupportedError
from .._shared.distributed import is_distributed
from .types import AttentionInputs, AttentionOutputs, Rope

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement


class Split(NamedTuple):
    """What the devices of a mesh share out.

    Attributes:
        mesh: the devices.
        along: for each dimension of the mesh what its devices have each a part of; ``None`` where all do the same.
    """

    mesh: DeviceMesh
    along: tuple[Literal["batch", "heads"] | None, ...]

    def placements(self, batch: int | None, heads: int | None) -> list[Placement]:
        """Of a tensor with the batch and the heads along such dimensions, ``None`` where it has none of its own."""
        from torch.distributed.tensor import Replicate, Shard

        dims = {"batch": batch, "heads": heads, None: None}
        return [Replicate() if dims[part] is None else Shard(dims[part]) for part in self.along]

    def part(self, x: Tensor, batch: int | None, heads: int | None) -> Tensor:
        """This device's part. A plain tensor is taken to be the same on every device."""
        from torch.distributed.tensor import DTensor, Partial

        placements = self.placements(batch, heads)
        if not is_distributed(x):
            x = DTensor.from_local(x, self.mesh, self._same(), run_check=False)
        # What devices share and use each for a part of the whole has a gradient that is the sum of theirs.
        gradients = [
            Partial() if part and placement.is_replicate() else placement
            for part, placement in zip(self.along, placements, strict=True)
        ]
        return x.redistribute(self.mesh, placements).to_local(grad_placements=gradients)

    def whole(self, x: Tensor, batch: int | None, heads: int | None) -> Tensor:
        """The DTensor of which ``x`` is this device's part."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(x, self.mesh, self.placements(batch, heads), run_check=False)

    def norm(self, x: Tensor) -> Tensor:
        """The norms ``[B, N]`` over all heads, of those over this device's."""
        from torch.distributed.tensor import DTensor, Partial

        if "heads" not in self.along:
            return self.whole(x, 0, None)
        placements = self.placements(0, None)
        sums = [Partial() if part == "heads" else p for part, p in zip(self.along, placements, strict=True)]
        squares = DTensor.from_local(x.square(), self.mesh, sums, run_check=False)
        return squares.redistribute(self.mesh, placements).sqrt()

    def _same(self) -> list[Placement]:
        from torch.distributed.tensor import Replicate

        return [Replicate()] * self.mesh.ndim


def split_of(query: Tensor) -> Split:
    """As a query ``[B, H, N, D]`` is placed, as far as attention can be split so, into even parts."""
    from torch.distributed.tensor import Shard

    mesh, along = query.device_mesh, []
    left = {"batch": query.shape[0], "heads": query.shape[1]}
    for dim, placement in enumerate(query.placements):
        devices = mesh.size(dim)  # not of mesh.shape, which torch 2.10's compiler cannot walk along
        part = {Shard(0): "batch", Shard(1): "heads"}.get(placement)
        if part and left[part] % devices == 0:
            left[part] //= devices
        else:
            part = None
        along.append(part)
    return Split(mesh, tuple(along))


def run(
    attend: Callable[[AttentionInputs, Tensor | None], tuple[Tensor, AttentionOutputs]],
    inputs: AttentionInputs,
    qkv: Tensor | None,
) -> tuple[Tensor, AttentionOutputs]:
    """A call whose query is a DTensor; what comes back is placed as the query is.

    Args:
        attend: the same call on plain tensors.
        inputs: the call.
        qkv: the packed projection, where there is one.

    Raises:
        TypeError: if only some of query, key and value are DTensors.
        UnsupportedError: if there is dropout.
    """
    if not (is_distributed(inputs.key) and is_distributed(inputs.value)):
        raise TypeError(
            "query, key and value must all be DTensors or none of them; make one of a plain tensor with "
            "DTensor.from_local or distribute_tensor"
        )
    if inputs.dropout_p > 0.0:
        raise UnsupportedError(
            "dropout_p is not served on DTensors, whose devices would not drop as one; give dropout_p=0.0"
        )
    split = split_of(inputs.query)
    if qkv is not None:
        qkv = split.part(qkv, 0, 3)
        query = qkv.detach().select(2, 0).transpose(1, 2)
        output, statistics = attend(_parts(inputs, split, query, query, query), qkv)
        return split.whole(output, 0, 2), _whole(statistics, split)
    query, key, value = (split.part(x, 0, 1) for x in (inputs.query, inputs.key, inputs.value))
    output, statistics = attend(_parts(inputs, split, query, key, value), None)
    return split.whole(output, 0, 1), _whole(statistics, split)


def _parts(inputs: AttentionInputs, split: Split, query: Tensor, key: Tensor, value: Tensor) -> AttentionInputs:
    """The call as this device makes it."""
    mask, rope = inputs.attn_mask, inputs.rope
    batch, heads = inputs.query.shape[:2]
    if mask is not None:
        mask = split.part(mask, 0 if mask.shape[0] == batch else None, 1 if mask.shape[1] == heads else None)
    if rope is not None:
        of_images = 0 if rope.cos.ndim == 3 and rope.cos.shape[0] == batch else None
        rope = Rope(*(split.part(x, of_images, None) for x in (rope.cos, rope.sin)), rope.interleaved)
    return inputs._replace(query=query, key=key, value=value, attn_mask=mask, rope=rope)


def _whole(statistics: AttentionOutputs, split: Split) -> AttentionOutputs:
    whole = {name: split.whole(x, 0, 1) for name, x in statistics._asdict().items() if x is not None}
    if statistics.token_norms is not None:
        whole["token_norms"] = split.norm(statistics.token_norms)
    return AttentionOutputs(**whole)
