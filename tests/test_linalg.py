"""Roots are roots, and damping follows one policy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import random_statistics
from torch.testing import assert_close

from iosvd.errors import NumericalError
from iosvd.grams import add_lower_gram_, add_product_, mirror_, tensor_cores
from iosvd.linalg import (
    LARGEST_DAMPING,
    DiagonalRoot,
    IdentityRoot,
    Root,
    RootKind,
    principal_directions,
    root_of,
)


def roots() -> dict[str, Root]:
    _, statistics = random_statistics(7, 9)
    metric = statistics.input_metric
    assert metric is not None
    return {
        "identity": IdentityRoot(),
        "diagonal": DiagonalRoot(metric.diagonal().sqrt()),
        "cholesky": root_of(metric, 1e-6, RootKind.cholesky, "R"),
        "eigen": root_of(metric, 1e-6, RootKind.eigen, "R"),
    }


@pytest.mark.parametrize("kind", ["identity", "diagonal", "cholesky", "eigen"])
def test_unapply_inverts_apply(kind: str) -> None:
    root = roots()[kind]
    matrix = torch.randn(9, 4, dtype=torch.float64)
    assert_close(root.unapply(root.apply(matrix)), matrix)
    assert_close(root.apply(root.unapply(matrix)), matrix)


@pytest.mark.parametrize("kind", list(RootKind))
def test_root_squares_to_the_damped_metric(kind: RootKind) -> None:
    metric = random_statistics(7, 9)[1].input_metric
    assert metric is not None
    eye = torch.eye(9, dtype=torch.float64)
    factor = root_of(metric, 1e-3, kind, "R").apply(eye).T
    assert_close(factor @ factor.T, metric + 1e-3 * metric.diagonal().mean() * eye)


@pytest.mark.parametrize("kind", list(RootKind))
def test_damping_is_raised_only_as_far_as_needed(kind: RootKind) -> None:
    # A clear negative eigenvalue of −1e-5 of the mean diagonal: damping 1e-5 cannot do, 1e-4 does.
    values = torch.tensor([-2e-5, 1.0, 2.0, 3.0], dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    metric = basis @ torch.diag(values) @ basis.T
    assert root_of(metric, 1e-7, kind, "R").damping == pytest.approx(1e-4)
    assert root_of(metric, 1e-3, kind, "R").damping == 1e-3


@pytest.mark.parametrize("kind", list(RootKind))
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64)), f"{LARGEST_DAMPING:g}"),
        (torch.zeros(3, 3, dtype=torch.float64), "zero"),
        (torch.full((3, 3), torch.nan, dtype=torch.float64), "not finite"),
    ],
)
def test_hopeless_metrics_name_the_site(kind: RootKind, metric: torch.Tensor, message: str) -> None:
    with pytest.raises(NumericalError, match=f"the input metric of x.*{message}"):
        root_of(metric, 1e-6, kind, "the input metric of x")


def test_principal_directions_agree_with_the_svd() -> None:
    matrix = torch.randn(6, 9, dtype=torch.float64)
    directions, sigma = principal_directions(matrix @ matrix.T)
    u, expected, _ = torch.linalg.svd(matrix, full_matrices=False)
    assert_close(sigma, expected)
    assert_close((directions * u).sum(0).abs(), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 16])
def test_blockwise_gram_is_the_gram(width: int) -> None:
    batches = torch.randn(3, 10, width, dtype=torch.float64)
    total = torch.zeros(width, width, dtype=torch.float64)
    for rows in batches:
        add_lower_gram_(total, rows)
    mirror_(total)
    together = batches.flatten(0, 1)
    assert_close(total, together.T @ together)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tf32_holds_every_number_in_half_precision(dtype: torch.dtype) -> None:
    """TF32 drops the last 13 bits of a float32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = every[~every.isnan()].float()
    assert len(numbers) > 60_000
    assert (numbers.view(torch.int32) & 0x1FFF == 0).all()


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dtypes", "on_cuda", "rounds_none"),
    [
        *[((half, half), True, True) for half in (HALF, BRAIN)],
        *[((SINGLE, SINGLE), True, False), ((BRAIN, SINGLE), True, False)],
        ((HALF, HALF), False, False),
    ],
)
def test_products_use_tf32_where_it_rounds_no_factor(
    dtypes: tuple[torch.dtype, torch.dtype], on_cuda: bool, rounds_none: bool
) -> None:
    setting = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(setting, "fp32_precision") else "allow_tf32"
    before = getattr(setting, name)
    # Stand-ins for tensors on a GPU, which this machine may not have.
    factors = [SimpleNamespace(dtype=dtype, is_cuda=on_cuda) for dtype in dtypes]
    with pytest.raises(ArithmeticError), tensor_cores(*factors):  # type: ignore[arg-type]
        assert (getattr(setting, name) in (True, "tf32")) == rounds_none
        raise ArithmeticError
    assert getattr(setting, name) == before


def test_products_of_half_precision_are_summed_in_float32() -> None:
    rows = torch.randn(64, 8).bfloat16()
    total, product = torch.zeros(8, 8), torch.zeros(8, 8)
    add_lower_gram_(total, rows)
    add_product_(product, rows, rows)
    wanted = (rows.double().T @ rows.double()).float()
    mirror_(total)
    assert_close(total, wanted)
    assert_close(product, wanted)
