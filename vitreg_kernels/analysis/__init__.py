"""The analyses of "Vision Transformers Need Registers" (Darcet et al., arXiv 2309.16588), on any Vision Transformer.

One pass over the images records what all of them need; each analysis is usable by itself. Not here: what watches a
model while it trains, which is ``monitor``.
"""

from __future__ import annotations
