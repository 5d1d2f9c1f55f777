"""Residual add, LayerNorm or RMSNorm, and the norm of each token, in one pass.

Not here: the modules that call it (``nn.block``), or how the norms of many tokens are distributed (``token_norms``).
"""
