"""The sequence ``[CLS | registers | patches]`` with its positions, written once.

Not here: the embedding of patches, or how positions are resampled to another grid (``nn``).
"""
