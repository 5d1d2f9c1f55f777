"""What ops have in common: checking arguments, joining autograd, capabilities, requirements, tiles of whole tokens.

Not here: anything that one op alone knows, or any choice between backends (``dispatch``). No op imports another; what
two of them need moves here.
"""
