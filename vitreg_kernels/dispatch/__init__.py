"""Which backend serves a call: what backends declare, what calls need, and which of the able ones is the default.

Not here: the backends themselves (``ops/<op>/backends``), what describes a call of one op (``ops/<op>/features.py``),
or measuring (``measure``), whose results become rows of the tables and of the user's file that are read here.
"""

from .request import ANY_CAPABILITY, ANY_SIZE, Request, Requirements, Workload
from .rules import Backend, Explanation, eligible, explain, find, instead_of, read_calibration, select, unmet

__all__ = [
    "ANY_CAPABILITY",
    "ANY_SIZE",
    "Backend",
    "Explanation",
    "Request",
    "Requirements",
    "Workload",
    "eligible",
    "explain",
    "find",
    "instead_of",
    "read_calibration",
    "select",
    "unmet",
]
