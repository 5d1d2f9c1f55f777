"""The command line: ``vitreg`` or ``python -m vitreg_kernels``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from ._runtime import native
from ._runtime.dispatch import ANY_SIZE
from .check import Result, check, usable_backends
from .ops.assemble import backends as assemble_backends
from .ops.assemble import features as assemble_features
from .ops.attention import backends as attention_backends
from .ops.attention import features as attention_features
from .ops.residual_norm import backends as norm_backends
from .ops.residual_norm import features as norm_features
from .ops.token_norms import backends as token_norm_backends
from .ops.token_norms import features as token_norm_features

BACKENDS = attention_backends.BACKENDS
# Each op: its backends, the sizes that differ between them, and what a call can ask of them.
_OPS = {
    "attention": (BACKENDS, "head_dims", attention_features.ALL),
    "residual norm": (norm_backends.BACKENDS, "channels", norm_features.ALL),
    "token norms": (token_norm_backends.BACKENDS, "channels", token_norm_features.ALL),
    "assemble": (assemble_backends.BACKENDS, None, assemble_features.ALL),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 only if all is well."""
    parser = argparse.ArgumentParser(prog="vitreg", description="Fused attention for ViTs with register tokens.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="this machine, and what each backend supports")
    checking = commands.add_parser("check", help="accuracy of every backend usable on this machine, against fp64")
    checking.add_argument("--backend", action="append", help="check this one only (may be repeated)")
    checking.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        print(info())
        return 0
    return _check(arguments.backend, arguments.device)


def info() -> str:
    """Versions, devices, and the support table made from the backends' declarations."""
    lines = [
        f"vitreg_kernels {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "xformers")),
        f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        f"GPU: {_gpu()}",
        f"native kernels: {native.described()}",
        "",
        "\n\n".join(map(support_table, _OPS)),
    ]
    return "\n".join(lines)


def support_table(op: str = "attention") -> str:
    """What each backend of an op serves: a Markdown table made from ``REQUIREMENTS``."""
    backends, size, features = _OPS[op]
    needs = [b.REQUIREMENTS for b in backends]
    rows = [(op, *(b.NAME for b in backends))]
    rows.append(("devices", *(" ".join(n.devices) for n in needs)))
    rows.append(("dtypes", *(" ".join(_short(d) for d in n.dtypes) for n in needs)))
    if size is not None:
        sizes = (getattr(n, size) for n in needs)
        rows.append((size.replace("_", " "), *("any" if s == ANY_SIZE else "{}-{}".format(*s) for s in sizes)))
    rows += [(feature, *("yes" if feature in n.features else "no" for n in needs)) for feature in features]
    return _table(rows)


def _check(names: list[str] | None, device: str) -> int:
    known = [b.NAME for b in BACKENDS]
    unknown = [n for n in names or () if n not in known]
    if unknown:
        print(f"unknown backend {unknown[0]!r}: expected one of {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        backends = tuple(names or usable_backends(device))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that it does not know or have
        print(f"cannot check on device {device!r}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(
        f"accuracy of {', '.join(backends)} on {device} against fp64: the output's errors, and the worst tensor of all"
    )
    columns = "{:<9} {:<38} {:<8} {:>9} {:>9} {:>9} {:>9}  {}"
    print(columns.format("backend", "case", "dtype", "max", "eager", "mean", "eager", "error of bound, verdict"))
    served = [result for result in map(_shown(columns), check(backends, device)) if not result.reasons]
    failed = sum(bool(result.failed) for result in served)
    print(f"{len(served) - failed} passed, {failed} failed")
    return 1 if failed or not served else 0


def _shown(columns: str) -> Callable[[Result], Result]:
    """Prints a result as a line of the table and hands it on."""

    def show(result: Result) -> Result:
        head = result.backend, result.case, _short(result.dtype)
        if not result.errors:
            verdict = f"FAIL: {result.crash}" if result.crash else f"not served: {'; '.join(result.reasons)}"
            print(columns.format(*head, "", "", "", "", verdict), flush=True)
            return result
        output = result.errors["output"]
        numbers = output.max_error, output.eager_max_error, output.mean_error, output.eager_mean_error
        tensor, strain = max(((t, a.strain) for t, a in result.errors.items()), key=lambda pair: pair[1])
        verdict = f"FAIL: {', '.join(result.failed)}" if result.failed else "pass"
        line = f"{strain:5.0%} {tensor}, {verdict}"
        print(columns.format(*head, *(f"{n:.2e}" for n in numbers), line), flush=True)
        return result

    return show


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _short(dtype: torch.dtype) -> str:
    return {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
