"""Residual add, LayerNorm or RMSNorm, and the norm of each token, in one pass."""
