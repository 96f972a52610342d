"""What a CUDA graph cannot hold, noticed on fake tensors: reads by the host, shapes from data, tensors elsewhere."""

import contextlib
import ctypes
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "equal", "is_nonzero")
SHAPES = ("nonzero", "masked_select", "unique_dim", "_unique2", "bincount", "repeat_interleave")


class NotCapturableError(AssertionError):
    """An operator that would not be right in a captured region."""


class DeviceRegion(TorchDispatchMode):
    """Every operator inside must have all of its tensors on the device, and must not depend on what they hold."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.device, self.operators = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in READS:
            raise NotCapturableError(f"{name}: the host reads what the device has computed")
        indices = tree_leaves(args[1]) if name.startswith("index") and len(args) > 1 else ()
        masks = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)
        if masks or (name in SHAPES and func._overloadname != "self_int"):
            raise NotCapturableError(f"{name}: a shape depends on data")
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != self.device:
                raise NotCapturableError(f"{name}: a tensor on {tensor.device}")
        self.operators += 1
        return result


@contextlib.contextmanager
def device_guard():
    """Have torch choose a CUDA device without one, as builds with CUDA do for fake tensors: by doing nothing.

    A build without CUDA has no guard at all for its devices; it gets that of the meta device.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    before = guards[cuda]
    guards[cuda] = before or guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before
