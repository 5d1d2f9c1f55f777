"""The L2 norm of each token, and how the norms of each group of tokens are distributed."""
