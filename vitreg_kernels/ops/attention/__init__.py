"""Attention over ``[CLS | registers | patches]``, with statistics from the same pass.

Not here: the projections before and behind it (``nn.attention``), or which backend is the default (``dispatch``).
"""
