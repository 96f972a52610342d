"""Triton kernels without a GPU: its interpreter runs them in NumPy, one program after the other.

Whether a kernel is interpreted is decided when it is defined, for triton's own library as well: conftest.py sets
TRITON_INTERPRET before anything can import triton. Where the interpreter differs from a GPU it is put right here.
"""

import os

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET must be 1 before triton is imported"

_patched: set[str] = set()
_cast = interpreter.InterpreterBuilder.cast_impl
_dot = interpreter.InterpreterBuilder.create_dot


def _call(self, *args, **kwargs):
    """A device function's call. Triton patches its language anew for each, which takes as long as the rest together."""
    module = self.fn.__module__
    if module not in _patched:
        _patched.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _cast_to_nearest(self, source, dtype):
    """Casts; float32 to bfloat16 (kept as bits) rounds to nearest even as on a GPU, where the interpreter cuts off."""
    if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, dtype)
    rounded = torch.tensor(source.data).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(rounded, tl.bfloat16)


def _dot_of_numbers(self, a, b, *more):
    """Products; the interpreter would multiply the bits of bfloat16."""
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *more)


interpreter.InterpretedFunction.__call__ = _call
interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest
interpreter.InterpreterBuilder.create_dot = _dot_of_numbers
np.seterr(all="ignore")  # a GPU does not warn of inf - inf either
