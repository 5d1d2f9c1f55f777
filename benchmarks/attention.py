"""The attention race: every contender on every ViT shape, interleaved, with its errors against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import machine, roofline, timing
from benchmarks.peers import Peer, Tensors, attempt, eager, peers
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
    the highest so far counts. The rows of cases that ``writer`` already has (from a cut run) are yielded as they stand.
    ``progress(done, total, label)`` is called before each case, and at the end with ``done == total``.
    """
    device = device or machine.default_device()
    todo = list(cases(size, device))
    ceilings: Roofline | None = None
    measured_at = 0
    for done, case in enumerate(todo):
        progress(done, len(todo), str(case))
        raced = writer.find(kind="attention", dtype=case.dtype, mode=case.mode, tokens=case.tokens)
        if raced:
            yield from raced
            continue
        if case.tokens != measured_at:
            measured_at, fresh = case.tokens, roofline.measure(device)
            ceilings = fresh.raised_to(ceilings) if ceilings else fresh
            yield from writer.extend([{"kind": "roofline", **ceilings._asdict()}])
        yield from writer.extend(race(case, peers(), ceilings, device, _BUDGET_S[size]))
    progress(len(todo), len(todo), "")


def race(
    case: Case, contenders: Sequence[Peer], ceilings: Roofline, device: torch.device, budget_s: float
) -> list[Row]:
    """One row for each contender, raced or refused, without its ``machine``."""
    copies = timing.copies_past_cache(inputs_of(case, device), device)
    qkv, grad_output = copies[0]
    accuracies: dict[str, dict[str, Errors]] = {}
    reasons: dict[str, str] = {}
    exact = job(eager, qkv[:1].double(), grad_output[:1].double())
    rounded = job(eager, qkv[:1], grad_output[:1])
    for peer in contenders:
        result = attempt(peer, job, qkv, grad_output)
        if isinstance(result, str):
            reasons[peer.name] = result
        else:
            accuracies[peer.name] = errors_of(result, exact, rounded)
        del result  # of a large case there is room for one only

    timings = timing.interleave(
        {
            peer.name: timing.Variant(lambda tensors, attend=peer.attend: job(attend, *tensors), peer.context)
            for peer in contenders
            if peer.name in accuracies
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
            "reason": reasons.get(peer.name),
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
        if peer.name in timings:
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
                "errors": accuracies[peer.name],
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
    """Errors of the first image; ``exact`` and ``rounded`` are its fp64 and its same-dtype eager result."""
    return {
        name: errors(accuracy.compare(tensor[:1], exact[name], rounded[name], terms=tensor.shape[1]))
        for name, tensor in result.items()
    }
