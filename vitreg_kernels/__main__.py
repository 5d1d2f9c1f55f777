"""``python -m vitreg_kernels``."""

from __future__ import annotations

from .cli import main

raise SystemExit(main())
