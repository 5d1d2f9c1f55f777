"""A device as a command is given it."""

from __future__ import annotations

import torch


def usable(name: str, to: str) -> torch.device:
    """The device of a name.

    Args:
        name: as torch takes it.
        to: what is to be done there, for the sentence.

    Raises:
        ValueError: if torch does not know it, or it is not there.
    """
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that it does not know or have
        raise ValueError(f"cannot {to} on device {name!r}: {str(error).splitlines()[0]}") from error
    return torch.device(name)
