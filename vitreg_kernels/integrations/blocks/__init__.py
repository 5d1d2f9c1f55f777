"""How other libraries' pre-norm blocks are computed with the add before their second norm fused into it.

Not here: the add at the end of a block, which belongs with the first norm of the next and is not the block's to call;
or putting anything in a block's place (``patching``).
"""
