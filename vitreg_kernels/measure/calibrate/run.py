"""``calibrate``: subjects one by one, each written down as soon as it is decided."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import dispatch
from ..._triton import mode
from ...dispatch import calibration, preferences
from ...ops.catalogue import OPS
from ..warm import compile_ahead
from . import idle
from .contest import Outcome, contest, measurement_of, request_of
from .subjects import Subject, of_model, of_shape


class Calibration(NamedTuple):
    """What came of it.

    Attributes:
        outcomes: one for each call, with gradients and without.
        file: where the choices were written; ``None`` if none were.
    """

    outcomes: tuple[Outcome, ...]
    file: Path | None


def calibrate(
    model_or_shapes: nn.Module | Sequence[Sequence[int]],
    batch: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    rope: bool = False,
    mask: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, Outcome | None], None] | None = None,
) -> Calibration:
    """Make the fastest backend that is right on this machine the default of calls like those named.

    Every backend that may serve a call is run twice on it, forward and backward, among memory full of NaN, and held
    against fp64 by the library's accuracy rule. Those that pass are raced, interleaved, at this very size, host time
    included. A backend becomes the default where it leads the present one by 3% in two races on a quiet machine; one
    that is wrong is no default there any more. Both are kept in the user's cache, and count for as long as the machine,
    the driver, torch, triton and this package do not change; ``explain`` says so.

    Calls like one are those of its op, dtype, head dim or channels, features and kind (from a packed projection, with
    statistics, with a branch, ...), with gradients or without, up to 64, 272, 2048 or more tokens an image, and up to
    32, 128, 512 or more heads in all. Where two sizes of one such bucket disagree, neither changes it.

    Args:
        model_or_shapes: shapes ``B, H, N, D`` of a query, each of which stands for a block of a ViT: its attention,
            residual norm, token norms and assembly; or a model, whose own calls are found by running it once on
            ``batch``, without gradients.
        batch: what the model takes, at the size that it will be used with.
        dtype: of shapes; bf16 on a GPU and fp32 on a CPU by default. Those of a model are its own: call this under
            ``torch.autocast`` if it is used so.
        device: of shapes; the GPU if there is one by default. A model's is that of its batch.
        rope, mask: whether shapes are of rotated patches, and of padded keys.
        dry_run: measure, and write nothing.
        progress: called as ``progress(done, of, outcome)`` before the first and after every call measured.

    Raises:
        ValueError: if there is nothing to calibrate, a shape is not that of a query, a model has no batch, the device
            is of another kind than CUDA and CPU, or VITREG_CALIBRATION=0.
        OSError: if the cache cannot be written.
        RuntimeError: if something else is using the GPU or the processor, under ``TRITON_INTERPRET``, or if a kernel
            broke the process's hold of the GPU; what was decided before is kept.
    """
    preferences.suggest_nothing()
    if mode.INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET runs kernels in an interpreter, whose times mean nothing: unset it")
    if not dry_run:
        calibration.check_writable()
    where = batch.device if isinstance(batch, Tensor) else _device(device)
    if where.type not in ("cuda", "cpu"):
        raise ValueError(f"calibration is of GPUs by CUDA and of CPUs, not of {where.type}")
    idle.check(where)
    subjects = _subjects(model_or_shapes, batch, dtype, where, rope=rope, mask=mask)
    work = [(subject, gradients) for subject in subjects for gradients in subject.modes]
    if where.type == "cuda":
        compile_ahead([partial(_launch, *piece, where) for piece in work], where)
    outcomes, file = [], None
    if progress is not None:
        progress(0, len(work), None)
    try:
        for subject, gradients in work:
            outcome = contest(subject, gradients, where)
            outcomes.append(outcome)
            measurement = None if dry_run else measurement_of(outcome, where, datetime.date.today().isoformat())
            if measurement is not None:
                file = calibration.record([measurement])
            if progress is not None:
                progress(len(outcomes), len(work), outcome)
    finally:
        if file is not None:
            dispatch.read_calibration()
        if where.type == "cuda":
            torch.cuda.empty_cache()
    return Calibration(tuple(outcomes if file is None else map(_as_it_is_now, outcomes)), file)


def _as_it_is_now(outcome: Outcome) -> Outcome:
    """What was decided of other sizes counts too: a bucket changes its default only where they agree."""
    now = dispatch.select(OPS[outcome.subject.op].backends, outcome.request, None).name
    if now == outcome.backend:
        return outcome
    why = preferences.ignored(outcome.request) or f"{now} is right and fastest for others of its bucket"
    return outcome._replace(backend=now, decided=False, reason=why)


def _subjects(
    model_or_shapes: nn.Module | Sequence[Sequence[int]],
    batch: Tensor | None,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    rope: bool,
    mask: bool,
) -> list[Subject]:
    if isinstance(model_or_shapes, nn.Module):
        if not isinstance(batch, Tensor):
            raise ValueError("a model is calibrated on a batch of what it takes: calibrate(model, images)")
        if dtype is not None or rope or mask:
            raise ValueError("dtype, rope and mask are of shapes; a model has its own")
        subjects = of_model(model_or_shapes, batch)
        if not subjects:
            raise ValueError(
                f"{type(model_or_shapes).__name__} calls no op of this library: give a RegisterViT, or a model with "
                "RegisterAttention in it"
            )
        return subjects
    if batch is not None:
        raise ValueError("a batch is of a model; shapes need none")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    subjects = [one for shape in model_or_shapes for one in of_shape(shape, dtype, device, rope=rope, mask=mask)]
    if not subjects:
        raise ValueError("there is nothing to calibrate: name a shape B,H,N,D or give a model")
    return subjects


def _launch(subject: Subject, gradients: bool, device: torch.device) -> None:
    """Whatever of a call our own kernels launch."""
    call = subject.make(gradients)
    request = request_of(subject, call, gradients, device)
    for backend in dispatch.eligible(OPS[subject.op].backends, request):
        if backend.opaque:
            call.run(backend.name)


def _device(device: torch.device | str | None) -> torch.device:
    """The device named, by default the present GPU, or else the CPU."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
