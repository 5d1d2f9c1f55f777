"""One case of a race: every contender checked against fp64, then all of them timed, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers import EAGER, Attend, Pack, Peer, Tensors, pack_of
from benchmarks.results import UNTIMED, Errors, Row, errors, timed
from benchmarks.shapes import DTYPES, Case
from vitreg_kernels.measure import accuracy, timing
from vitreg_kernels.measure.cases.attention import GRADIENTS
from vitreg_kernels.measure.race import Contender, Raced, race

Copy = tuple[Tensor, ...]  # the inputs of a layout, and the gradient of the output
MEASURED = (*UNTIMED, "gbps", "speedup", "errors")


def contest(case: Case, contenders: Sequence[Peer], copies: Sequence[Copy], budget_s: float) -> list[Row]:
    """One row for each contender, raced or not: what the rows of all races have, without ``kind`` and ``machine``.

    Args:
        case: what they are to do.
        contenders: on the case's layout.
        copies: of the input, see ``inputs_of`` and ``timing.copies_past_cache``.
        budget_s: seconds of timing, shared by all.
    """
    about = {
        "dtype": case.dtype,
        "mode": case.mode,
        "batch": case.batch,
        "heads": case.heads,
        "tokens": case.tokens,
        "prefix_tokens": case.prefix_tokens,
        "head_dim": case.head_dim,
        "flops": case.flops,
        "bytes": case.bytes,
    }
    rows = compete(contenders, copies, budget_s, check_of(case, copies[0]), partial(_variant, case), case.bytes)
    return [about | row for row in rows]


def compete(
    contenders: Sequence[Peer],
    copies: Sequence[Copy],
    budget_s: float,
    check: Callable[..., dict[str, Errors]],
    variant: Callable[[Peer], timing.Variant],
    useful_bytes: int,
) -> list[Row]:
    """``race`` as rows: one for each contender, of what was found.

    Args:
        contenders: on the inputs that ``copies`` hold.
        copies, budget_s: as of ``contest``.
        check: errors of what a contender's function makes of the first copy.
        variant: how a contender is timed.
        useful_bytes: traffic of a call, for its speed.
    """
    racing = [
        Contender(peer.name, partial(peer.do, check, *copies[0]), variant(peer), peer.ours) for peer in contenders
    ]
    outcomes = race(racing, copies, device=copies[0][0].device, budget_s=budget_s)
    peer_ms = {
        peer.name: outcome.timing.median_ms
        for peer in contenders
        if isinstance(outcome := outcomes[peer.name], Raced) and not peer.ours
    }
    best_peer = min(peer_ms, key=peer_ms.__getitem__, default=None)

    rows = []
    for peer in contenders:
        row = {
            "variant": peer.name,
            "ours": peer.ours,
            "reason": None,
            "failed": False,
            "best_peer": best_peer,
            **dict.fromkeys(MEASURED),
        }
        outcome = outcomes[peer.name]
        if isinstance(outcome, Raced):
            median_ms = outcome.timing.median_ms
            row |= {
                **timed(outcome.timing),
                "gbps": useful_bytes / median_ms / 1e6,
                "speedup": peer_ms[best_peer] / median_ms if best_peer else None,
                "errors": outcome.found,
            }
        else:
            row |= outcome._asdict()
        rows.append(row)
    return rows


def runs_of(case: Case) -> tuple[tuple[int, int], ...]:
    """(images, tokens an image) of a multi-crop case: all samples' crops of one size, then those of the next."""
    return tuple((case.batch * images, tokens) for images, tokens in case.crops)


def inputs_of(case: Case, device: torch.device) -> Callable[[], Copy]:
    """Makes copies of one input: query, key and value in the case's layout and the gradient of the output, all normal.

    That of ``[B, H, N, D]`` is a view of ``[B, N, H, D]`` memory, as the projection behind attention gives it.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[case.dtype])

    batch, tokens, heads, head_dim = case.batch, case.tokens, case.heads, case.head_dim
    if case.layout == "multicrop":
        batch, tokens = 1, batch * tokens
    if case.layout == "separate":
        inputs = [normal(batch, heads, tokens, head_dim) for _ in range(3)]
        grad_output = normal(batch, tokens, heads, head_dim).transpose(1, 2)
    else:
        inputs = [normal(batch, tokens, 3, heads, head_dim)]
        grad_output = normal(batch, tokens, heads * head_dim)
    differentiable = case.mode != "forward"
    return lambda: (*(x.clone().requires_grad_(differentiable) for x in inputs), grad_output.clone())


def job(attend: Attend, *tensors: Tensor) -> Tensors:
    """``attend(*inputs)`` and, if the inputs want gradients, those; ``tensors`` are the inputs and ``grad_output``."""
    *inputs, grad_output = tensors
    output = attend(*inputs)
    if not inputs[0].requires_grad:
        return {"output": output}
    gradients = torch.autograd.grad(output, inputs, grad_output)
    if len(gradients) == 1:
        gradients = gradients[0].unbind(2)
    return {"output": output.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}


def errors_of(case: Case, result: Tensors, exact: Tensors, rounded: Tensors) -> dict[str, Errors]:
    """Errors of the first and the last image; ``exact`` and ``rounded`` are their fp64 and same-dtype eager results.

    A kernel that mistakes one image for another is wrong there, and fp64 on a whole batch would take most of a run.
    """
    terms = max((tokens for _, tokens in case.crops), default=case.tokens)
    return {
        name: errors(accuracy.compare(first_and_last(case, tensor), exact[name], rounded[name], terms=terms))
        for name, tensor in result.items()
    }


def first_and_last(case: Case, tensor: Tensor) -> Tensor:
    """The first and the last image, which may be one, of any input, output or gradient of a case."""
    if case.layout == "multicrop":
        (_, first), *_, (_, last) = case.crops
        return torch.cat((tensor[:, :first], tensor[:, -last:]), dim=1)
    return tensor[:: max(len(tensor) - 1, 1)]


def check_of(case: Case, copy: Copy) -> Callable[..., dict[str, Errors]]:
    """``check(attend, *copy)`` gives the errors of what ``attend`` makes of a copy of a case's input."""
    few = [first_and_last(case, x) for x in copy]
    eager = EAGER.attend(case.layout, _pack_of_first_and_last(case, copy[0].device))
    exact, rounded = job(eager, *(x.double() for x in few)), job(eager, *few)

    def check(attend: Attend, *tensors: Tensor) -> dict[str, Errors]:
        return errors_of(case, job(attend, *tensors), exact, rounded)

    return check


def _pack_of_first_and_last(case: Case, device: torch.device) -> Pack | None:
    if case.layout != "multicrop":
        return None
    (_, first), *_, (_, last) = case.crops
    return pack_of(((1, first), (1, last)), device)


def _variant(case: Case, peer: Peer) -> timing.Variant:
    if case.mode != "backward":
        return timing.Variant(lambda copy: job(peer.attend, *copy), peer.context)

    def prepare(copy: Copy) -> tuple[Tensor, list[Tensor], Tensor]:
        *inputs, grad_output = copy
        return peer.attend(*inputs), inputs, grad_output

    return timing.Variant(lambda prepared: torch.autograd.grad(*prepared), peer.context, prepare)
