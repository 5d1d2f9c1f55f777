"""Build flags of the native extension. There is none yet: every kernel in this version is Python or Triton."""

from setuptools import setup

setup()
