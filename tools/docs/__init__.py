"""What the documentation site needs beside its pages: parts of pages that are written from the code and from result
files (``python -m tools.docs`` after a change), and what ``mkdocs.yml`` builds with.

Not here: the pages (``docs``), or any measuring (``benchmarks``).
"""
