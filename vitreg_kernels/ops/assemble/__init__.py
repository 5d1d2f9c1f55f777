"""The sequence ``[CLS | registers | patches]`` with its positions, written once."""
