"""The analyses of "Vision Transformers Need Registers" (Darcet et al., arXiv 2309.16588), on any Vision Transformer.

One pass over the images records what all of them need (``record``); what is made of it stands in a file each and is
usable by itself; ``run`` makes all of them into a page. Not here: what watches a model while it trains, which is
``monitor``.

Raises:
    ModuleNotFoundError: on import, if a package of the extra ``analysis`` is not installed.
"""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = ("jinja2", "matplotlib", "PIL", "scipy", "sklearn", "tqdm")

if missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"vitreg_kernels.analysis needs {', '.join(missing)}: run `pip install 'vitreg_kernels[analysis]'`",
        name=missing[0],
    )
