"""What is to be known of a library whose own tests are run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Peer(NamedTuple):
    """A library, and which of its tests are run.

    Attributes:
        name: of the library, and of its distribution.
        built_by: ``module:function`` or ``module:Class.method`` that every model passes when it is built. The model is
            what it returns or, of a method that returns none, its object.
        tests: files of tests, in the folder ``<name>_tests`` of what was fetched, or elsewhere.
        groups: patterns of a model's, test class's or test function's name. A test is in the first group that fits it,
            and is not run if none does.
        all_groups: those of ``--all``.
        left_out: functions among the tests that are not run, for want of the network.
        needs: distributions that the tests import beside the library, each without what it depends on itself.
    """

    name: str
    built_by: str
    tests: tuple[str | Path, ...]
    groups: tuple[str, ...]
    all_groups: Callable[[], tuple[str, ...]]
    left_out: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
