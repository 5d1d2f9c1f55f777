"""Attention over ``[CLS | registers | patches]``, with statistics from the same pass."""
