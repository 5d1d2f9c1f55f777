"""What an analysis takes of a ViT, in one pass, by ``analysis.record`` and by timm: ``python -m benchmarks.analysis``.

Both give the token norms of every block, the attention of the CLS and register tokens and the attention that each token
receives, of every block, and the tokens behind the last one. timm's ``AttentionExtract`` keeps the probabilities
``[B, H, N, N]`` of every block, as notebooks and tools for attention maps do, and all is computed of them afterwards.
Fewer would be kept by hooks that each compute what is wanted of their block alone.

The model has random weights in which attention matters. The two ways are timed in turns, both are held against timm's
in fp64, and the memory of each is that of a process of its own, on Linux.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import machine, results
from benchmarks.machine import Machine
from benchmarks.report import number
from benchmarks.results import Errors, Row, Writer
from benchmarks.timm_vits import formula, import_timm, sharpened
from vitreg_kernels.analysis.record import record
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.accuracy import compare

Way = Literal["record", "AttentionExtract"]
_MODEL = "vit_small_patch14_reg4_dinov2"
_BATCH, _SIZE = 2, 518
_TERMS = 1536  # the longest sum of the network, the MLP's hidden width
_COLUMNS = "{:<17} {:>9} {:>13} {:>7} {:>10}  {}"


class AnalysisRow(results.HostTime):
    """One way of taking the same of a model, in fp32 on a CPU."""

    kind: Literal["analysis"]
    model: str  # timm's
    way: Way
    batch: int  # images
    tokens: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    speedup: float  # AttentionExtract's median / this one
    peak_memory_bytes: int  # of the first call in a process, above what it held before; weights and images left out
    errors: dict[str, Errors]  # of each part of ``Shown``
    machine: Machine


results.ROW_TYPES["analysis"] = AnalysisRow


class Shown(NamedTuple):
    """What is taken of a model of L blocks.

    Attributes:
        norms: ``[L, B, N]``, of the tokens behind each block.
        attention: ``[L, B, H, P, N]``, of the CLS and register tokens.
        received: ``[L, B, H, N]``, averaged over queries.
        tokens: ``[B, N, C]``, behind the last block, before the final norm.
    """

    norms: Tensor
    attention: Tensor
    received: Tensor
    tokens: Tensor


def recorder(model: nn.Module) -> Callable[[Tensor], Shown]:
    """Takes it by ``record``, of the model as it is: it is patched and given back in every call."""
    layers = range(len(model.blocks))

    def take(images: Tensor) -> Shown:
        found = record(model, images, features=[(-1, "tokens")], attention=layers, received=layers)
        maps = (torch.stack([of[layer] for layer in layers]) for of in (found.attention, found.received))
        return Shown(found.norms, *maps, *found.features.values())

    return take


def extractor(model: nn.Module) -> Callable[[Tensor], Shown]:
    """Takes it by timm's ``AttentionExtract`` and hooks, of a model of its own around the same parameters."""
    from timm.utils import AttentionExtract

    tree = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    norms: list[Tensor] = []
    for block in tree.blocks:
        formula(block.attn)  # there are probabilities to keep
        block.register_forward_hook(lambda block, args, x: norms.append(x.norm(dim=-1)))
    last = f"blocks.{len(tree.blocks) - 1}"
    extract = AttentionExtract(tree, ["*.attn_drop", last], method="hook")

    @torch.inference_mode()
    def take(images: Tensor) -> Shown:
        norms.clear()
        found = extract(images)
        tokens, maps = found.pop(last), found.values()
        attention = torch.stack([p[:, :, : tree.num_prefix_tokens] for p in maps])
        return Shown(torch.stack(norms), attention, torch.stack([p.mean(dim=2) for p in maps]), tokens)

    return take


WAYS: dict[Way, Callable[[nn.Module], Callable[[Tensor], Shown]]] = {
    "record": recorder,
    "AttentionExtract": extractor,
}


def build() -> nn.Module:
    """The model, in fp32."""
    torch.manual_seed(0)
    return sharpened(import_timm().create_model(_MODEL, img_size=_SIZE, num_classes=0)).eval()


def images(model: nn.Module) -> Tensor:
    """As many as a call has, of the model's size."""
    size = model.patch_embed.img_size
    return torch.randn(_BATCH, 3, *size, generator=torch.Generator().manual_seed(0))


def peak_memory(build: Callable[[], nn.Module], way: Way) -> int:
    """Bytes that a process of its own holds at most in a call, above what it held before, with the model in it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (torch.get_num_threads(),)) as process:
        return process.submit(_growth, build, way).result()


def _growth(build: Callable[[], nn.Module], way: Way) -> int:
    model = build()
    take, batch = WAYS[way](model), images(model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held (man proc_pid_clear_refs)
    before = _resident_peak()
    take(batch)
    return _resident_peak() - before


def _resident_peak() -> int:
    """Of this process in bytes. ``getrusage`` has another: it begins with that of the process that started this one."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def race(build: Callable[[], nn.Module], budget_s: float) -> list[Row]:
    """A row for each way, without its ``machine``."""
    peaks = {way: peak_memory(build, way) for way in WAYS}
    model = build()
    batch = images(model)
    takes = {way: make(model) for way, make in WAYS.items()}
    exact = extractor(copy.deepcopy(model).double())(batch.double())
    eager = takes["AttentionExtract"](batch)
    errors = {way: _errors(take(batch), exact, eager) for way, take in takes.items()}
    timings = timing.interleave(
        {way: timing.Variant(take) for way, take in takes.items()},
        [batch],  # no copies: every call reads all the weights, which are larger than a cache
        device=batch.device,
        budget_s=budget_s,
    )
    return [
        {
            "kind": "analysis",
            "model": _MODEL,
            "way": way,
            "batch": len(batch),
            "tokens": exact.tokens.shape[1],
            **results.timed(timings[way]),
            "speedup": timings["AttentionExtract"].median_ms / timings[way].median_ms,
            "peak_memory_bytes": peaks[way],
            "errors": errors[way],
        }
        for way in WAYS
    ]


def _errors(found: Shown, exact: Shown, eager: Shown) -> dict[str, Any]:
    parts = zip(Shown._fields, found, exact, eager, strict=True)
    return {name: results.errors(compare(*tensors, terms=_TERMS)) for name, *tensors in parts}


def line(row: Row) -> str:
    """A row as text."""
    times = f"{number(row['median_ms'])} ms", f"{number(row['p20_ms'])}-{number(row['p80_ms'])}"
    peak = f"{row['peak_memory_bytes'] / 2**20:.0f} MiB"
    errors = ", ".join(
        f"{name} {error['max']:.1e} ({error['eager_max']:.1e}){'' if error['passed'] else '  FAIL'}"
        for name, error in row["errors"].items()
    )
    return _COLUMNS.format(row["way"], *times, f"x {row['speedup']:.2f}", peak, errors)


def main() -> int:
    """Race both; the exit status is 1 if a result breaks the accuracy rule."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="of timing the race")
    parser.add_argument("--fresh", action="store_true", help="begin a new file, do not go on from a cut run")
    asked = parser.parse_args()
    here = machine.describe(torch.device("cpu"))
    run = {"command": "analysis", "budget": str(asked.budget)}
    writer = Writer(results.default_path(here, "-analysis"), run, here, fresh=asked.fresh)
    print(_COLUMNS.format("way", "median", "p20-p80", "", "memory", "errors (those of AttentionExtract)"))
    for row in writer.find(kind="analysis") or writer.extend(race(build, asked.budget)):
        print(line(row), flush=True)
    writer.finish()
    print(os.path.relpath(writer.path))
    return 0 if all(error["passed"] for row in writer.rows for error in row["errors"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
