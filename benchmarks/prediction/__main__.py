"""Writes the predictions of all shipped kernels: ``python -m benchmarks.prediction``, without a GPU."""

from __future__ import annotations

from benchmarks.prediction.table import FILE, document

if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(document())
    print(f"wrote {FILE}")
