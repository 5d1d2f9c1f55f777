"""``vitreg info``: what this machine has, and what each backend serves."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .._native import library
from .._version import __version__
from ..dispatch import ANY_SIZE, Requirements
from ..measure.cases.tensors import short
from ..ops.catalogue import OPS
from .calibrate import calibrated
from .table import markdown


def info() -> str:
    """Versions, devices, and the support table made from the backends' declarations."""
    lines = [
        f"vitreg_kernels {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, " + ", ".join(f"{name} {_version(name)}" for name in ("triton", "xformers")),
        f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        f"GPU: {_gpu()}",
        f"native kernels: {library.summary()}",
        calibrated(),
        "",
        "\n\n".join(map(support_table, OPS)),
    ]
    return "\n".join(lines)


def support_table(op: str = "attention") -> str:
    """What each backend of an op serves: a Markdown table made from their requirements."""
    of = OPS[op]
    needs = [b.requirements for b in of.backends]
    rows = [(op.replace("_", " "), *(b.name for b in of.backends))]
    rows.append(("devices", *(" ".join(n.devices) for n in needs)))
    rows.append(("dtypes", *(" ".join(short(d) for d in n.dtypes) for n in needs)))
    if of.size is not None:
        sizes = (getattr(n, of.size) for n in needs)
        rows.append((of.size.replace("_", " "), *("any" if s == ANY_SIZE else "{}-{}".format(*s) for s in sizes)))
    rows += [(feature, *(_served(feature, n) for n in needs)) for feature in of.features]
    return markdown(rows)


def _served(feature: str, needs: Requirements) -> str:
    if feature not in needs.features:
        return "no"
    return "if named" if feature in needs.features_if_named else "yes"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
