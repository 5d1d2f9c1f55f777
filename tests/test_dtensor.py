"""DTensors: two processes that share out images or heads give the output, gradients and statistics of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.two_processes import PROCESSES, member
from vitreg_kernels import RegisterAttention, Rope, UnsupportedError
from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

BATCH, TOKENS, HEADS, HEAD_DIM, PREFIX = 4, 9, 2, 8, 3

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def separate(qkv, **options):
    output, statistics = register_attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), **options)
    return output.transpose(1, 2).flatten(2), statistics


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def results(attend, qkv, **options):
    """Output and statistics, gradients of the projection and of an additive mask; and how the first are placed."""
    mask = options.get("attn_mask")
    derived = [qkv] if mask is None or mask.dtype == torch.bool else [qkv, mask]
    for x in derived:
        x.requires_grad_()
    output, statistics = attend(qkv, num_prefix_tokens=PREFIX, outputs=OUTPUT_NAMES, **options)
    whole(output).square().sum().backward()
    found = [*map(whole, (output, *statistics, *(x.grad for x in derived)))]
    return found, [x.placements for x in (output, *statistics)] if isinstance(output, DTensor) else None


def same(name, found, expected):
    """What differs."""
    try:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    except AssertionError as error:
        return [f"{name}: {error}"]
    return []


def calls(mesh):
    """Every split of every kind of call."""
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, HEAD_DIM)
    patches = TOKENS - PREFIX
    keys = torch.rand(BATCH, 1, 1, TOKENS) > 0.3
    images_rope = Rope(torch.randn(BATCH, patches, HEAD_DIM), torch.randn(BATCH, patches, HEAD_DIM))
    rope = Rope(*images_rope._replace(cos=images_rope.cos[0], sin=images_rope.sin[0])[:2])
    bias = torch.randn(1, HEADS, TOKENS, TOKENS)
    kinds = {
        "plain": (None, {}),
        "a mask of keys and a rope of each image": (None, {"attn_mask": keys, "rope": images_rope}),
        "sdpa, a mask of one image for all": ("sdpa", {"attn_mask": keys[:1], "rope": rope}),
        "sdpa, a bias by heads": ("sdpa", {"attn_mask": bias}),
        "sdpa, a bias for all heads": ("sdpa", {"attn_mask": bias[:, :1]}),
    }
    by_images, by_heads, alike = Shard(0), Shard(3), Replicate()
    failures = []
    for kind, (backend, options) in kinds.items():
        for attend in (register_attention_qkv, separate):
            expected, _ = results(attend, qkv.clone(), backend=backend, **copied(options, torch.clone))
            for split in (by_images, by_heads, alike, Shard(1)):
                name = f"{kind}, {attend.__name__}, {split}"
                distributed = distribute_tensor(qkv, mesh, [split])
                # Tensors beside the projection may be plain, if they are the same everywhere, or DTensors.
                place = torch.clone if attend is separate else lambda x: distribute_tensor(x, mesh, [alike])
                found, placements = results(attend, distributed, backend=backend, **copied(options, place))
                failures += same(name, found, expected)
                heads = Shard(2) if split == by_heads else alike
                kept = by_images if split == by_images else None
                of_heads = Shard(1) if split == by_heads else alike
                if placements != [(kept or heads,), *[(kept or of_heads,)] * 4, (kept or alike,)]:
                    failures.append(f"{name}: placed as {placements}")
    return failures


def copied(options, place):
    options = dict(options)
    if "rope" in options:
        options["rope"] = Rope(place(options["rope"].cos), place(options["rope"].sin))
    if "attn_mask" in options:
        options["attn_mask"] = place(options["attn_mask"])
    return options


def edges(mesh):
    failures = []
    pack, bounds = torch.randn(1, TOKENS, 3, HEADS, HEAD_DIM), torch.tensor([0, 4, TOKENS])
    expected, _ = results(register_attention_qkv, pack.clone(), cu_seqlens=bounds)
    for split in (Shard(0), Shard(3)):  # one row cannot be split by images
        for cu_seqlens in (bounds, distribute_tensor(bounds, mesh, [Replicate()])):
            distributed = distribute_tensor(pack, mesh, [split])
            found, _ = results(register_attention_qkv, distributed, cu_seqlens=cu_seqlens)
            failures += same(f"a pack, {split}", found, expected)
    uneven = torch.randn(3, TOKENS, 3, 3, HEAD_DIM)
    expected, _ = results(register_attention_qkv, uneven.clone())
    for split in (Shard(0), Shard(3)):
        found, _ = results(register_attention_qkv, distribute_tensor(uneven, mesh, [split]))
        failures += same(f"an uneven {split}", found, expected)
    found, _ = results(register_attention_qkv, DTensor.from_local(uneven / PROCESSES, mesh, [Partial()]))
    failures += same("partial sums", found[:1], expected[:1])
    grid = init_device_mesh("cpu", (PROCESSES, 1))
    found, placements = results(
        register_attention_qkv, distribute_tensor(pack.expand(4, -1, -1, -1, -1), grid, [Shard(0), Shard(3)])
    )
    expected, _ = results(register_attention_qkv, pack.repeat(4, 1, 1, 1, 1))
    failures += same("two dimensions", found, expected)
    if placements[0] != (Shard(0), Shard(2)):
        failures.append(f"two dimensions: placed as {placements[0]}")
    return failures


class Attention(nn.Module):
    """With three projections, which ColwiseParallel splits by heads."""

    def __init__(self):
        super().__init__()
        dim = HEADS * HEAD_DIM
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        query, key, value = (f(x).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.proj(register_attention(query, key, value).transpose(1, 2).flatten(2))


def tensor_parallel(mesh):
    model, x = Attention(), torch.randn(BATCH, TOKENS, HEADS * HEAD_DIM)
    model(x).square().sum().backward()
    expected = [model(x), *(p.grad for p in model.parameters())]
    twin = Attention()
    twin.load_state_dict(model.state_dict())
    columns = ColwiseParallel(use_local_output=False)
    parallelize_module(twin, mesh, {"q": columns, "k": columns, "v": columns, "proj": RowwiseParallel()})
    twin(x).square().sum().backward()
    return same("column-wise and row-wise", [twin(x), *(whole(p.grad) for p in twin.parameters())], expected)


def refusals(mesh):
    x = torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM)
    split = distribute_tensor(x, mesh, [Shard(0)])
    failures = []
    for error, said, call in (
        (TypeError, "must all be DTensors", lambda: register_attention(split, split, x)),
        (UnsupportedError, "dropout_p", lambda: register_attention(split, split, split, dropout_p=0.1)),
        *((ValueError, "parts queries from keys", lambda local=local: fused(mesh, local)) for local in (True, False)),
    ):
        try:
            call()
            failures.append(f"{said}: not refused")
        except error as raised:
            if said not in str(raised):
                failures.append(f"{said}: {raised}")
    return failures


def fused(mesh, local):
    """A column-wise split of a packed projection."""
    module = RegisterAttention(HEADS * HEAD_DIM, HEADS)
    parallelize_module(module, mesh, {"qkv": ColwiseParallel(use_local_output=local), "proj": RowwiseParallel()})
    module(torch.randn(BATCH, TOKENS, HEADS * HEAD_DIM))


def compiled(mesh):
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, HEAD_DIM)
    expected, _ = results(register_attention_qkv, qkv.clone())
    attend = torch.compile(register_attention_qkv, fullgraph=True, backend="aot_eager")
    return same("compiled", results(attend, distribute_tensor(qkv, mesh, [Shard(3)]))[0], expected)


def work(rank: int, folder: str) -> None:
    with member(rank, folder):
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (PROCESSES,))
        failures = [failure for check in (calls, edges, tensor_parallel, refusals, compiled) for failure in check(mesh)]
        Path(folder, f"{rank}.txt").write_text("\n".join(failures))


def test_two_processes_give_what_one_gives(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=PROCESSES)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(PROCESSES)] == ["", ""]
