"""The L2 norm of each token, and how the norms of each group of tokens are distributed.

Not here: which tensors of a model are counted, and what is reported of them (``monitor``).
"""
