"""Writes the predictions of all shipped kernels by the running triton: ``python -m benchmarks.prediction``, no GPU."""

from __future__ import annotations

from benchmarks.prediction.table import FILE, document

if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(document(FILE.read_text() if FILE.exists() else ""))
    print(f"wrote {FILE}")
