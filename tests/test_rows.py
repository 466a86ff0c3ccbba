"""A matrix in rows of two widths multiplies like the matrix it stands for, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from iosvd.layers import rows as rows_module
from iosvd.layers.int8 import Code
from iosvd.layers.modules import LowRankLinear, RowLinear
from iosvd.layers.rows import RowLayout, Rows, multiply, order_dtype, restore, store_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Which of the rows: none, all, the first, every third.
PATTERNS = {
    "none": lambda n: torch.zeros(n, dtype=torch.bool),
    "all": lambda n: torch.ones(n, dtype=torch.bool),
    "first": lambda n: torch.arange(n) < n // 2,
    "mixed": lambda n: torch.arange(n) % 3 == 1,
}
patterns = pytest.mark.parametrize("pattern", PATTERNS)
by_outputs = pytest.mark.parametrize("by_output", [True, False], ids=["outputs", "inputs"])


def stored(
    pattern: str, by_output: bool, dtype: torch.dtype, code: Code = Code.linear
) -> tuple[Tensor, Rows, RowLayout]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, 14, generator=generator)
    int8 = PATTERNS[pattern](20 if by_output else 14)
    halves = rows_module.half_dtype(dtype)
    first = pattern == "first"
    return matrix, *store_rows(matrix, int8, halves, by_output, "x", code, first)


@patterns
@by_outputs
def test_rows_stand_for_the_matrix(pattern: str, by_output: bool) -> None:
    matrix, rows, layout = stored(pattern, by_output, torch.float32)
    int8 = PATTERNS[pattern](20 if by_output else 14)
    assert layout.int8 == int8.sum() == len(rows.scale)
    assert rows.codes.shape == ((layout.int8, 14) if by_output else (20, layout.int8))
    assert layout.ordered == (pattern == "mixed") == (rows.order is not None)
    error = restore(rows, layout) - matrix
    lines = error if by_output else error.T
    # Row by row: half a scale, and fp16's rounding for the others.
    largest = (matrix if by_output else matrix.T).abs().amax(1)
    assert (lines.abs().amax(1)[int8] <= largest[int8] / 127 / 2 * (1 + 2**-10)).all()
    assert (lines.abs().amax(1)[~int8] <= largest[~int8] * 2**-11).all()
    if pattern != "none":
        assert lines[int8].abs().max() > 0


@patterns
@by_outputs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", Code)
def test_multiplying_is_multiplying_by_the_matrix(
    pattern: str, by_output: bool, dtype: torch.dtype, code: Code
) -> None:
    _, rows, layout = stored(pattern, by_output, dtype, code)
    for shape in ((14,), (3, 14), (2, 5, 14), (0, 14)):
        # fp16 has no room below: a scale times a small input would be rounded away.
        small = 1e-3 if dtype == torch.float16 else 1.0
        x = (torch.randn(shape) * small).to(dtype)
        found = multiply(x, rows, layout)
        assert found.dtype == dtype
        expected = x.double() @ restore(rows, layout, torch.float64).T
        tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 4 * small)


@by_outputs
@pytest.mark.parametrize("entries", [1, 40, 10**6])
def test_blocks_change_nothing(
    by_output: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows, layout = stored("mixed", by_output, torch.float32)
    monkeypatch.setattr(rows_module, "BLOCK_ENTRIES", entries)
    x = torch.randn(3, 14)
    assert_close(multiply(x, rows, layout), x @ restore(rows, layout).T)


def test_half_precision_does_not_overflow_before_the_scale() -> None:
    """Sums of integer codes would: 127 × 500 × 2000 entries, far beyond 65504."""
    matrix = torch.full((4, 2000), 1e-4)
    rows, layout = store_rows(matrix, torch.ones(4, dtype=torch.bool), torch.float16, True, "x")
    x = torch.full((1, 2000), 500.0, dtype=torch.float16)
    assert_close(multiply(x, rows, layout), torch.full((1, 4), 100.0).half(), rtol=2e-3, atol=0)


@patterns
@by_outputs
def test_bits_are_what_the_tensors_take(pattern: str, by_output: bool) -> None:
    _, rows, _ = stored(pattern, by_output, torch.bfloat16)
    held = sum(8 * t.numel() * t.element_size() for t in rows if t is not None)
    assert rows.bits == held


def test_numbers_of_rows_are_as_short_as_they_can_be() -> None:
    assert order_dtype(32_767) == torch.int16
    assert order_dtype(32_768) == torch.int32


@pytest.mark.skipif(not hasattr(torch, "_weight_int8pack_mm"), reason="no packed kernel here")
@by_outputs
def test_the_packed_kernel_agrees_with_the_plain_path(
    by_output: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(64, 96)
    everything = torch.ones(64 if by_output else 96, dtype=torch.bool)
    rows, layout = store_rows(matrix, everything, torch.bfloat16, by_output, "x")
    x = torch.randn(4, 96).bfloat16()
    calls = []
    kernel = torch._weight_int8pack_mm
    monkeypatch.setattr(
        torch, "_weight_int8pack_mm", lambda *given: (calls.append(1), kernel(*given))[1]
    )
    fast = multiply(x, rows, layout)
    assert calls
    monkeypatch.setattr(rows_module, "PACKED_ROWS", 0)
    plain = multiply(x, rows, layout)
    assert len(calls) == 1
    # One rounding to bfloat16 more.
    assert_close(fast, plain, rtol=2 * 2**-8, atol=2e-2)
    monkeypatch.undo()
    x.requires_grad_()
    multiply(x, rows, layout).sum().backward()  # The kernel could not.
    assert x.grad is not None and x.grad.abs().sum() > 0


def layer_of(kind: str, dtype: torch.dtype) -> LowRankLinear | RowLinear:
    torch.manual_seed(0)
    mixed = {n: RowLayout(3, by_output=n == "left", ordered=True) for n in ("weight", "left")}
    if kind == "dense":
        layer: LowRankLinear | RowLinear = RowLinear(
            12, 10, bias=True, dtype=dtype, layouts={"weight": RowLayout(3, True, True)}
        )
    else:
        layer = LowRankLinear(12, 10, 5, bias=True, dtype=dtype, layouts=mixed)
    for name, shape in layer.shapes.items():
        layout = layer.layouts[name]
        int8 = torch.arange(shape[0] if layout.by_output else shape[1]) % 3 == 1
        int8[int8.nonzero()[3:]] = False
        layout_int8 = int(int8.sum())
        assert layout_int8 <= 3
        int8[torch.arange(len(int8))[~int8][: 3 - layout_int8]] = True
        halves = rows_module.half_dtype(dtype)
        made, _ = store_rows(torch.randn(shape), int8, halves, layout.by_output, "x")
        with torch.no_grad():
            for mine, theirs in zip(layer.rows(name), made, strict=True):
                assert mine is not None and theirs is not None
                mine.copy_(theirs)
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_a_layer_is_its_dense_equivalent_and_compiles(kind: str) -> None:
    layer = layer_of(kind, torch.float32)
    x = torch.randn(6, 12)
    assert_close(layer(x), layer.dense(torch.float32)(x), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_kept_rows_of_a_layer_can_be_trained(kind: str) -> None:
    layer = layer_of(kind, torch.float32)
    layer(torch.randn(6, 12)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_casting_a_layer_leaves_its_scales(kind: str) -> None:
    layer = layer_of(kind, torch.float16)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(torch.bfloat16)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
