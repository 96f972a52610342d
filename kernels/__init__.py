"""Triton kernels. This folder is installed as ``pcm_fast.kernels``.

The version is here for a reason: transformers probes for Hugging Face's package of the same name, and takes this folder
for it when the repository root is on ``sys.path``. Version 0 tells it that what it found is too old to use.
"""

__version__ = "0"
