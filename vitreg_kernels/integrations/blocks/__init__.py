"""How other libraries' pre-norm blocks are computed with the add before their second norm fused into it.

The add at the end of a block belongs with the first norm of the next, which is not the block's to call; it stays.
"""
