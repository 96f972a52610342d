"""kernels/adapters.py in Triton's interpreter against plain torch."""

import pytest
import torch
import triton_interpreter  # noqa: F401
from pcm_fast.kernels.adapters import expand, shrink

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def case(seed, rows, size_in, size_out, rank, adapters, dtype):
    """Inputs, adapters of ranks 1 to `rank` stacked with zeros, and a row without one."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size_in, generator=random).to(dtype)
    A = torch.randn(adapters, rank, size_in, generator=random) / size_in**0.5
    B = torch.randn(adapters, size_out, rank, generator=random)
    for n in range(adapters):
        A[n, 1 + n % rank :] = 0
    y = torch.randn(rows, size_out, generator=random).to(dtype)
    adapter = torch.randint(-1, adapters, (rows,), generator=random, dtype=torch.int32)
    adapter[rows // 2] = -1
    return x, A.to(dtype), B.to(dtype), y, adapter


def expected(x, A, B, y, adapter):
    result = y.double().clone()
    for t, a in enumerate(adapter.tolist()):
        if a >= 0:
            result[t] += B[a].double() @ (A[a].double() @ x[t].double())
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "size_in", "size_out", "rank", "adapters", "splits"),
    [
        (1, 64, 64, 1, 1, 1),
        (5, 577, 65, 3, 4, 1),
        (33, 1025, 130, 16, 5, 3),
        (4, 2049, 63, 17, 2, 32),
        (2, 511, 1, 8, 3, 2),
    ],
)
def test_equals_torch(rows, size_in, size_out, rank, adapters, splits, dtype):
    x, A, B, y, adapter = case(rows, rows, size_in, size_out, rank, adapters, dtype)
    wanted = expected(x, A, B, y, adapter)
    before = y.clone()
    expand(shrink(x, A, adapter, splits=splits), B, adapter, y)
    scale = wanted.abs().max()
    assert ((y.double() - wanted).abs().max() / scale) < TOLERANCE[dtype]
    assert (y[adapter < 0] == before[adapter < 0]).all()


def test_sites_that_share_their_input_shrink_together():
    x, A, B, y, adapter = case(7, 6, 200, 96, 8, 3, torch.float32)
    _, A2, B2, _, _ = case(8, 6, 200, 96, 8, 3, torch.float32)
    both = torch.cat([y, y], dim=1)
    parts = shrink(x, torch.cat([A, A2], dim=1), adapter, splits=2)
    expand(parts[:, :, :8], B, adapter, both[:, :96])
    expand(parts[:, :, 8:], B2, adapter, both[:, 96:])
    torch.testing.assert_close(both[:, :96].double(), expected(x, A, B, y, adapter), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[:, 96:].double(), expected(x, A2, B2, y, adapter), atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_the_others():
    x, A, B, y, adapter = case(9, 9, 700, 70, 4, 3, torch.float32)
    together = y.clone()
    expand(shrink(x, A, adapter, splits=2), B, adapter, together)
    for t in range(9):
        alone = y[t : t + 1].clone()
        expand(shrink(x[t : t + 1], A, adapter[t : t + 1], splits=2), B, adapter[t : t + 1], alone)
        assert (alone[0] == together[t]).all()


def test_inputs_and_outputs_may_be_columns_of_wider_rows():
    x, A, B, y, adapter = case(10, 4, 100, 50, 4, 3, torch.float32)
    wide_x, wide_y = torch.full((4, 300), torch.nan), torch.full((4, 90), 7.0)
    wide_x[:, 100:200], wide_y[:, 20:70] = x, y
    expand(shrink(wide_x[:, 100:200], A, adapter), B, adapter, wide_y[:, 20:70])
    torch.testing.assert_close(wide_y[:, 20:70].double(), expected(x, A, B, y, adapter), atol=1e-5, rtol=1e-5)
    assert (wide_y[:, :20] == 7).all()
    assert (wide_y[:, 70:] == 7).all()


def test_bad_shapes():
    x, A, B, y, adapter = case(11, 4, 100, 50, 4, 3, torch.float32)
    with pytest.raises(ValueError, match="shrink: expected contiguous rows"):
        shrink(x[:, :50], A, adapter)
    with pytest.raises(ValueError, match="splits: expected 1 to 32, got 33"):
        shrink(x, A, adapter, splits=33)
    with pytest.raises(ValueError, match="expand: shapes do not fit"):
        expand(shrink(x, A, adapter), B[:, :, :3].contiguous(), adapter, y)
