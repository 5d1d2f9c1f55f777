"""The tests of timm and transformers themselves, run with every model patched: ``python -m tests.peers timm``.

They are fetched from the package index, at the version that is installed, and run once as they are and once patched.
"""
