"""The attention race: every contender on every ViT shape, interleaved, with its errors against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import machine, roofline, timing
from benchmarks.peers import Peer, Stopped, Tensors, attempt, eager, peers
from benchmarks.results import Errors, Row, Writer, errors
from benchmarks.roofline import Roofline
from benchmarks.shapes import DTYPES, Case, Size, cases
from vitreg_kernels import accuracy

Progress = Callable[[int, int, str], None]

# Seconds of timing a case, shared by its contenders; their warm-up, their errors and the few samples that a slow one
# takes beyond its share come on top.
_BUDGET_S: dict[Size, float] = {"quick": 1.0, "full": 15.0}
_MEASURED = ("median_ms", "p20_ms", "p80_ms", "samples", "gflops", "peak_fraction", "gbps", "speedup", "errors")


def run(size: Size, writer: Writer, progress: Progress, device: torch.device | None = None) -> Iterator[Row]:
    """Races every contender over the cases of ``size`` and yields the rows, case by case, once they are written.

    The ceilings are measured again before each length, as the machine's clock may rise or a neighbour fall quiet, and
    the highest that ``writer`` holds counts. The rows of cases that ``writer`` already has (from a cut run) are yielded
    as they stand. ``progress(done, total, label)`` is called before each case, and at the end with ``done == total``.
    """
    device = device or machine.default_device()
    todo = list(cases(size, device))
    measured_at = 0
    for done, case in enumerate(todo):
        progress(done, len(todo), str(case))
        raced = writer.find(kind="attention", dtype=case.dtype, mode=case.mode, tokens=case.tokens)
        if raced:
            yield from raced
            continue
        if case.tokens != measured_at:
            measured_at = case.tokens
            yield from writer.extend([{"kind": "roofline", **roofline.measure(device)._asdict()}])
        ceilings = roofline.highest(writer.rows)
        yield from writer.extend(race(case, peers(size), ceilings, device, _BUDGET_S[size]))
    progress(len(todo), len(todo), "")


def race(
    case: Case, contenders: Sequence[Peer], ceilings: Roofline, device: torch.device, budget_s: float
) -> list[Row]:
    """One row for each contender, raced or not, without its ``machine``."""
    copies = timing.copies_past_cache(inputs_of(case, device), device)
    qkv, grad_output = copies[0]
    few_qkv, few_grad_output = first_and_last(qkv), first_and_last(grad_output)
    exact = job(eager, few_qkv.double(), few_grad_output.double())
    rounded = job(eager, few_qkv, few_grad_output)

    def check(attend: Callable[[Tensor], Tensor], qkv: Tensor, grad_output: Tensor) -> dict[str, Errors]:
        return errors_of(job(attend, qkv, grad_output), exact, rounded)

    outcomes = {peer.name: attempt(peer, check, qkv, grad_output) for peer in contenders}
    stopped = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Stopped)}

    timings = timing.interleave(
        {
            peer.name: timing.Variant(lambda tensors, attend=peer.attend: job(attend, *tensors), peer.context)
            for peer in contenders
            if peer.name not in stopped
        },
        copies,
        device=device,
        budget_s=budget_s,
    )
    peer_ms = {p.name: timings[p.name].median_ms for p in contenders if p.name in timings and not p.ours}
    best_peer = min(peer_ms, key=peer_ms.__getitem__, default=None)
    peak_gflops = ceilings.peak_gflops(case.dtype)

    rows = []
    for peer in contenders:
        row = {
            "kind": "attention",
            "variant": peer.name,
            "ours": peer.ours,
            "reason": None,
            "failed": False,
            "dtype": case.dtype,
            "mode": case.mode,
            "batch": case.batch,
            "heads": case.heads,
            "tokens": case.tokens,
            "prefix_tokens": case.prefix_tokens,
            "head_dim": case.head_dim,
            "flops": case.flops,
            "bytes": case.bytes,
            "peak_gflops": peak_gflops,
            "peak_gbps": ceilings.copy_gbps,
            "best_peer": best_peer,
            **dict.fromkeys(_MEASURED),
        }
        if peer.name in stopped:
            row |= stopped[peer.name]._asdict()
        else:
            timed = timings[peer.name]
            gflops = case.flops / timed.median_ms / 1e6
            row |= {
                "median_ms": timed.median_ms,
                "p20_ms": timed.p20_ms,
                "p80_ms": timed.p80_ms,
                "samples": timed.samples,
                "gflops": gflops,
                "peak_fraction": gflops / peak_gflops,
                "gbps": case.bytes / timed.median_ms / 1e6,
                "speedup": peer_ms[best_peer] / timed.median_ms if best_peer else None,
                "errors": outcomes[peer.name],
            }
        rows.append(row)
    return rows


def inputs_of(case: Case, device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    """Makes copies of one input: qkv ``[B, N, 3, H, D]`` and the gradient of the output ``[B, N, C]``, both normal."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.tokens, 3, case.heads, case.head_dim)
    tensors = (torch.randn(s, generator=generator) for s in (shape, (*shape[:2], case.heads * case.head_dim)))
    qkv, grad_output = (x.to(device, DTYPES[case.dtype]) for x in tensors)
    backward = case.mode == "forward+backward"
    return lambda: (qkv.clone().requires_grad_(backward), grad_output.clone())


def job(attend: Callable[[Tensor], Tensor], qkv: Tensor, grad_output: Tensor) -> Tensors:
    """The timed job: ``attend(qkv)``, and its gradients if qkv wants any."""
    if not qkv.requires_grad:
        return {"output": attend(qkv)}
    output = attend(qkv)
    (grad_qkv,) = torch.autograd.grad(output, qkv, grad_output)
    grad_query, grad_key, grad_value = grad_qkv.unbind(2)
    return {"output": output.detach(), "grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}


def errors_of(result: Tensors, exact: Tensors, rounded: Tensors) -> dict[str, Errors]:
    """Errors of the first and the last image; ``exact`` and ``rounded`` are their fp64 and same-dtype eager results.

    A kernel that mistakes one image for another is wrong there, and fp64 on a whole batch would take most of a run.
    """
    return {
        name: errors(accuracy.compare(first_and_last(tensor), exact[name], rounded[name], terms=tensor.shape[1]))
        for name, tensor in result.items()
    }


def first_and_last(batch: Tensor) -> Tensor:
    """The first and the last image, which may be one, as a view ``[1 or 2, ...]``."""
    return batch[:: max(len(batch) - 1, 1)]
