"""The primitive of all quantisations: codes, scales, and what cannot be coded."""

from __future__ import annotations

import pytest
import torch

from iosvd.errors import NumericalError
from iosvd.layers.four_bit import FourBitLinear, four_bit_bits, quantize_groups, restore_groups
from iosvd.layers.int8 import DYNAMIC_LEVELS, Code, levels_of, quantize_rows


def random_rows(spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 33, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None] ** spread


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.3])  # The last reaches fp16's subnormal scales.
def test_an_entry_is_wrong_by_at_most_half_a_scale(spread: float) -> None:
    rows = random_rows(spread) * (0.1 if spread > 2 else 1)
    codes, scale = quantize_rows(rows, Code.linear, "x")
    assert codes.dtype == torch.int8 and scale.dtype == torch.float16
    assert codes.abs().max() <= 127
    error = (codes.double() * scale.double()[:, None] - rows).abs()
    assert (error <= scale.double()[:, None] / 2 * (1 + 1e-12)).all()
    # No larger than it must be: the next smaller fp16 number would not reach the largest entry.
    assert (scale.double() < rows.abs().amax(1) / 127 * (1 + 2**-10) + 2**-24).all()


def test_codes_are_the_nearest_ones() -> None:
    rows = random_rows()
    for code in Code:
        codes, scale = quantize_rows(rows, code, "x")
        levels = levels_of(torch.arange(-128, 128).to(torch.int8), code, torch.float64)
        possible = levels[1:] if code is Code.linear else levels  # −128 is not used.
        nearest = (rows[..., None] / scale.double()[:, None, None] - possible).abs().amin(-1)
        found = rows / scale.double()[:, None] - levels_of(codes, code, torch.float64)
        assert torch.allclose(found.abs(), nearest, rtol=0, atol=1e-6)


def test_the_dynamic_code_has_256_levels_finer_towards_zero() -> None:
    levels = DYNAMIC_LEVELS.double()
    assert len(levels.unique()) == 256
    assert levels.max() == 1 and levels.min() > -1 and 0 in levels
    positive = levels[levels > 0]
    steps = (positive[1:] - positive[:-1]) / positive[1:]
    assert positive.min() < 1e-6
    # In each decade steps are even, so relative ones fall towards its end; 64 in the topmost.
    assert steps[-64:].max() < 0.13
    assert (positive > 0.1).sum() == 65


def test_a_row_of_zeros_is_stored_exactly() -> None:
    rows = random_rows()
    rows[3] = 0
    for code in Code:
        codes, scale = quantize_rows(rows, code, "x")
        assert scale[3] == 0
        assert torch.isfinite(levels_of(codes, code, torch.float64)).all()
        restored = levels_of(codes, code, torch.float64) * scale.double()[:, None]
        assert (restored[3] == 0).all()


def test_a_scale_beyond_fp16_names_the_site() -> None:
    rows = random_rows()
    rows[7, 2] = 127 * 65505.0 * 1.01
    with pytest.raises(NumericalError, match=r"scale of a row of layers\.3\.up is 6\.6.*fp16"):
        quantize_rows(rows, Code.linear, "layers.3.up")
    with pytest.raises(NumericalError, match=r"4-bit weights of layers\.3\.up"):
        quantize_groups(rows, 8, "layers.3.up")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_names_the_site(bad: float) -> None:
    rows = random_rows()
    rows[0, 0] = bad
    with pytest.raises(NumericalError, match=r"layers\.3\.up"):
        quantize_rows(rows, Code.linear, "layers.3.up")


@pytest.mark.parametrize(("columns", "group"), [(33, 8), (32, 8), (7, 128), (16, 1)])
def test_four_bits_are_wrong_by_at_most_half_a_scale(columns: int, group: int) -> None:
    weight = random_rows(0.5)[:, :columns]
    codes, scale = quantize_groups(weight, group, "x")
    restored = restore_groups(codes, scale, columns, group).double()
    of_entry = scale.double().repeat_interleave(group, dim=1)[:, :columns]
    # Scales are rounded to fp16, so the largest entry may be beyond seven of them by a hair.
    assert ((restored - weight).abs() <= of_entry * (0.5 + 7 * 2**-10)).all()
    assert 8 * (codes.nbytes + scale.nbytes) == four_bit_bits(50, columns, group)


def test_the_four_bit_layer_is_its_weight() -> None:
    layer = FourBitLinear(33, 50, 8, bias=True, dtype=torch.float32)
    codes, scale = quantize_groups(random_rows(0.1), 8, "x")
    layer.weight.copy_(codes)
    layer.scale.copy_(scale)
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 33)
    expected = x @ restore_groups(codes, scale, 33, 8).float().T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.dense(torch.float32)(x), expected)
