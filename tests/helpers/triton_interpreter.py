"""Triton kernels without a GPU: its interpreter runs them in NumPy, one program after the other.

Whether a kernel is interpreted is decided when it is defined, for triton's own library as well: conftest.py sets
TRITON_INTERPRET before anything can import triton.
"""

import os

import numpy as np
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET must be 1 before triton is imported"
_patched: set[str] = set()


def _call(self, *args, **kwargs):
    """A device function's call. Triton patches its language anew for each, which takes as long as the rest together."""
    module = self.fn.__module__
    if module not in _patched:
        _patched.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call
np.seterr(all="ignore")  # a GPU does not warn of inf - inf either
