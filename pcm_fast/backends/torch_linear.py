"""Linear layers on torch: the base's product for all rows, and LoRA by row on top of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pcm_fast.adapter import Adapter, AdapterSite
from pcm_fast.backends import torch_ops


def on_device(array: npt.NDArray[np.float32], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A copy of an array on a device; rounded there, so that no second copy is made here."""
    return torch.from_numpy(array).to(device).to(dtype)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product x W^T in float32, for x [T, in] float32 and W [out, in] float32 or bfloat16.

    bfloat16 weights meet inputs rounded to bfloat16, as tensor cores want them, and the sums stay in float32. The CPU
    multiplies the same numbers as float32.
    """
    if weight.dtype == torch.float32:
        return functional.linear(x, weight)
    if x.device.type == "cpu":
        return functional.linear(x.to(weight.dtype).float(), weight.float())
    return torch.mm(x.to(weight.dtype), weight.t(), out_dtype=torch.float32)


class StackedAdapters:
    """What all adapters of a model add to the sites that read one input, shrunk together.

    Attributes:
        A: [N, R, in], the ranks of the sites one after the other, each filled up with zeros to the largest adapter's.
        parts: for each site where its ranks begin and end, where its outputs begin, and B [N, out, rank].
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        sites: Sequence[tuple[str, int, int]],
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """sites: module path, first column among the outputs, and number of outputs of each."""
        ranks = [max((a.sites[path].rank for a in adapters if path in a.sites), default=0) for path, _, _ in sites]
        stacked = np.zeros((len(adapters), sum(ranks), in_features), np.float32)
        self.parts: list[tuple[int, int, int, torch.Tensor]] = []
        first = 0
        for (path, column, out_features), rank in zip(sites, ranks, strict=True):
            if rank == 0:
                continue
            expand = np.zeros((len(adapters), out_features, rank), np.float32)
            for n, adapter in enumerate(adapters):
                site: AdapterSite | None = adapter.sites.get(path)
                if site is not None:
                    stacked[n, first : first + site.rank] = site.A
                    expand[n, :, : site.rank] = site.B * np.float32(site.scaling)
            self.parts.append((first, first + rank, column, on_device(expand, dtype, device)))
            first += rank
        self.A = on_device(stacked, dtype, device)

    def add(self, x: torch.Tensor, adapter: torch.Tensor, y: torch.Tensor) -> None:
        """Add B A x to y [T, out] in place; adapter: [T] int32, -1 for rows without one."""
        low = torch_ops.shrink(x, self.A, adapter)
        for first, last, column, B in self.parts:
            torch_ops.expand(low[:, :, first:last], B, adapter, y[:, column : column + B.shape[1]])


class Linear:
    """Layers that read one input as one product: weights stacked along the output, biases, adapters."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, adapters: StackedAdapters | None = None
    ) -> None:
        self.weight, self.bias = weight, bias
        self.adapters = adapters if adapters is not None and adapters.parts else None

    @property
    def num_bytes(self) -> int:
        """Bytes of weights, biases and adapters."""
        tensors = [self.weight, *([] if self.bias is None else [self.bias])]
        if self.adapters is not None:
            tensors += [self.adapters.A, *(B for _, _, _, B in self.adapters.parts)]
        return sum(tensor.nbytes for tensor in tensors)

    def __call__(self, x: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
        """[T, out] float32, from x [T, in] float32 and the adapter of each row."""
        y = product(x, self.weight)
        if self.bias is not None:
            y += self.bias
        if self.adapters is not None:
            self.adapters.add(x, adapter, y)
        return y
