"""Token norms of a model while it trains: counted by layer and group, reported, written down and drawn.

Not here: the counting itself (``ops/token_norms``), or where a model's stream passes (``integrations``).
"""

from __future__ import annotations

from .monitor import TokenNormMonitor
from .report import NormReport, NormRow
from .writers import CsvWriter, TensorBoardWriter, read_csv

__all__ = ["CsvWriter", "NormReport", "NormRow", "TensorBoardWriter", "TokenNormMonitor", "read_csv"]
