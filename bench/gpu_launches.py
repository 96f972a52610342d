"""What the launchers of the Triton kernels launch, recorded without a GPU: kernels, grids and arguments.

A launcher is called with tensors on the meta device, which have shapes and strides but no memory, while triton's own
launch is replaced by a note of it. What is noted is what a GPU would get, so that it can be compiled and counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

if knobs.runtime.interpret:
    raise RuntimeError("TRITON_INTERPRET is set: there would be nothing to compile")

DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
ALIGNED = [["tt.divisibility", 16]]


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]  # num_warps and the like

    def source(self) -> ASTSource:
        """What triton compiles for these arguments: 1 and None are constants to it, multiples of 16 are known."""
        signature, constants, attributes = {}, {}, {}
        constexprs = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        for index, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            if name in constexprs or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(index,)] = "*" + DTYPES[value.dtype], ALIGNED
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(index,)] = ALIGNED
        return ASTSource(self.kernel, signature, constants, attributes)


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """The launches that a call makes, in order; none of them takes place."""
    noted: list[Launch] = []

    def note(kernel: JITFunction[Any], *values: Any, grid: Any, warmup: bool, **more: Any) -> None:
        arguments = dict(zip(kernel.arg_names, values, strict=False))
        arguments |= {name: value for name, value in more.items() if name in kernel.arg_names}
        options = {name: value for name, value in more.items() if name not in kernel.arg_names}
        noted.append(Launch(kernel, tuple(grid), arguments, options))

    launch = JITFunction.run
    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = launch
    return noted
