"""One-line mistakes in the Triton kernels, for tests/gpu/mutate_kernels.py."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """In kernels/<file>, `new` in place of `old`, which is there once."""

    file: str
    what: str
    old: str
    new: str
    but: str = "sweep or largest or dtypes or depends"  # tests that take long and are not needed to notice

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"

    @property
    def tests(self) -> str:
        """The test file that has to notice."""
        name = {"adapters.py": "adapters", "attention.py": "attention"}.get(self.file)
        return f"tests/gpu/test_{name or 'mix_sample'}.py"


OF_THE_DECODER = [
    Mutation(
        "adapters.py", "off-by-one mask of the input", "x_stride + i, mask=i < end", "x_stride + i, mask=i <= end"
    ),
    Mutation("adapters.py", "swapped stride of A", "r[:, None] * A_stride_r", "r[:, None] * A_stride_n"),
    Mutation(
        "adapters.py",
        "swapped stride of B",
        "a * B_stride_n + o[:, None] * B_stride_o",
        "a * B_stride_o + o[:, None] * B_stride_o",
    ),
    Mutation("adapters.py", "the first part is not summed", "range(splits)", "range(1, splits)"),
    Mutation("adapters.py", "the base's product is lost", "(base + tl.sum", "(tl.sum"),
    Mutation(
        "adapters.py",
        "off-by-one mask of the output",
        "low[None, :], 1)).to(y.dtype.element_ty), mask=o < size",
        "low[None, :], 1)).to(y.dtype.element_ty), mask=o <= size",
    ),
    Mutation("attention.py", "off-by-one mask of the context", "inside = token < end", "inside = token <= end"),
    Mutation("attention.py", "the running sum is not rescaled", "total * shrink + tl.sum", "total + tl.sum"),
    Mutation(
        "attention.py", "the greatest score is not subtracted", "tl.exp2(score - new_top[:, None])", "tl.exp2(score)"
    ),
    Mutation(
        "attention.py",
        "swapped stride of the keys",
        "kv_head * key_stride_h + slot * key_stride_s",
        "kv_head * key_stride_s + slot * key_stride_h",
    ),
    Mutation("attention.py", "the window is one token short", "length - window, 0", "length - window + 1, 0"),
    Mutation(
        "attention.py", "the last part is not combined", "mask=(s[:, None] < splits)", "mask=(s[:, None] < splits - 1)"
    ),
    Mutation(
        "attention.py",
        "an empty part counts",
        'tl.where(top == float("-inf"), 0.0, tl.exp2(top - greatest))',
        "tl.exp2(top - greatest)",
    ),
]
