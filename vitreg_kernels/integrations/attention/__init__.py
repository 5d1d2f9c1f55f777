"""How other libraries' attention modules are computed by ours, one file a library. Puts nothing in their place.

What is patched, given back, reported and captured is in ``patching``.
"""
