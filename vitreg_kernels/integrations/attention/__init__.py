"""How other libraries' attention modules are computed by ours, one file a library.

Not here: putting it in their place, giving it back, reporting and capturing, which is ``patching``.
"""
