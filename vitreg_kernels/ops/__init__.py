"""The four ops, a folder each of one shape; ``catalogue`` lists them and ``_shared`` holds what they have in common.

Not here: modules (``nn``), or which backend is the default (``dispatch``).
"""
