"""Corrections: the closed form against generic solvers, and what every correction must keep."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import pytest
import torch
from conftest import FAMILIES, all_variants, build, divided, random_statistics
from torch import Tensor, nn
from torch.testing import assert_close

import iosvd.correction
from iosvd.allocation import SensitivitySearch, Spectral, Uniform
from iosvd.correction import (
    Anchored,
    BlockLoss,
    Correction,
    CorrectionInputs,
    CorrectionResult,
    Distilled,
    EndToEnd,
    Ladder,
    Lora,
    NoCorrection,
    ProjectedGradient,
    Randomized,
    Refinement,
    RefitOptions,
    Sequential,
    WeightedRefit,
)
from iosvd.correction.adaptive_trust import AdaptiveTrust
from iosvd.correction.distilled import kl_from
from iosvd.correction.drift import Drift, DriftSums, best_weight, squared_error
from iosvd.correction.projected_gradient import moved
from iosvd.errors import ConfigError
from iosvd.evaluation.divergence import divergence
from iosvd.factorization import Factorization, truncate
from iosvd.layers.replacement import low_rank_layers, stored_bytes
from iosvd.linalg import RootKind, root_of
from iosvd.method import Method
from iosvd.models.losses import mean_loss
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.pipeline import Compressed, compress
from iosvd.quantization import LossAwareRemap, NoQuantization, Quantization, Score
from iosvd.truncation import TruncatedSites
from iosvd.types import Site, Whitener
from iosvd.whitening import Identity, Input, InputOutput, Whitening
from iosvd.windows import Windows

TOKENS = torch.randint(0, 31, (9, 12), generator=torch.Generator().manual_seed(1))
M, N, COUNT = 6, 9, 200


def run(
    correction: Correction, ratio: float = 0.6, family: str = "llama", **options: object
) -> Compressed:
    settings = divided({"correction": correction, **options})
    return compress(build(family), TOKENS, ratio=ratio, batch_size=4, **settings)


def tokens_of_a_site() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W, inputs x_d and x_c of all tokens, and what the stream lacks."""
    weight, _ = random_statistics(M, N)
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x_d = normal(COUNT, N) @ normal(N, N) + normal(N)
    x_c = x_d + 0.4 * normal(COUNT, N) @ normal(N, N) + 0.5
    return weight, x_d, x_c, 0.3 * x_c @ normal(N, M) + normal(M) + 0.2 * normal(COUNT, M)


def drift_of(x_d: Tensor, x_c: Tensor, lacking: Tensor | None) -> Drift:
    sums = DriftSums()
    for start in (0, 70, 140):
        part = slice(start, start + 70)
        sums.add(x_d[part], x_c[part], None if lacking is None else lacking[part])
    return sums.means()


def damped_metric() -> tuple[Tensor, Tensor]:
    """Return an output metric C and its root's product, with next to no damping."""
    _, statistics = random_statistics(M, N)
    metric = statistics.need("kl_metric") * 1e4
    return metric, torch.linalg.cholesky(metric)


@pytest.mark.parametrize("trust", [1.0, 0.4])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("stream", [True, False])
def test_full_rank_is_what_a_generic_least_squares_solver_finds(
    trust: float, ridge: float, stream: bool
) -> None:
    """The ridge is N more tokens, whose inputs are multiples of the unit vectors."""
    weight, x_d, x_c, lacking = tokens_of_a_site()
    found = best_weight(
        weight, drift_of(x_d, x_c, lacking if stream else None), trust, ridge, "site"
    )
    dense = x_d @ weight.T + (lacking if stream else 0)
    targets = trust * dense + (1 - trust) * x_c @ weight.T
    scale = (ridge * COUNT * x_c.square().mean()) ** 0.5 * torch.eye(N, dtype=torch.float64)
    inputs = torch.cat([x_c, scale])
    expected = torch.linalg.lstsq(inputs, torch.cat([targets, scale @ weight.T])).solution.T
    assert_close(found, expected)


def test_a_bias_is_what_a_column_of_ones_would_be() -> None:
    weight, x_d, x_c, lacking = tokens_of_a_site()
    found = best_weight(weight, drift_of(x_d, x_c, lacking).centred(), 1.0, 0.0, "site")
    ones = torch.ones(COUNT, 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([x_c, ones], 1), x_d @ weight.T + lacking).solution
    assert_close(found, solution[:N].T)


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_k_is_what_alternating_minimisation_converges_to(rank: int) -> None:
    """Weighted least squares in one factor at a time, to convergence, never heard of an SVD."""
    weight, x_d, x_c, lacking = tokens_of_a_site()
    drift, (metric, _) = drift_of(x_d, x_c, lacking), damped_metric()
    whitener = Whitener(
        root_of(metric, 0.0, RootKind.cholesky, "C"),
        root_of(drift.inputs, 0.0, RootKind.cholesky, "R"),
    )
    best = best_weight(weight, drift, 1.0, 0.0, "site")
    closed = truncate(Factorization()(best, whitener, "site"), rank).dense()
    targets = x_d @ weight.T + lacking

    def error(product: Tensor) -> float:
        residual = targets - x_c @ product.T
        return float(torch.einsum("ti,ij,tj->", residual, metric, residual) / COUNT)

    generator = torch.Generator().manual_seed(5)
    left = torch.randn(M, rank, generator=generator, dtype=torch.float64)
    right = torch.zeros(rank, N, dtype=torch.float64)
    for _ in range(3000):
        solve = torch.linalg.solve(left.T @ metric @ left, left.T @ metric)
        right = torch.linalg.lstsq(x_c, targets @ solve.T).solution.T
        left = torch.linalg.lstsq(x_c @ right.T, targets).solution.T
    assert error(closed) == pytest.approx(error(left @ right), rel=1e-7)
    assert_close(closed, left @ right, rtol=1e-4, atol=1e-4)


def test_the_held_out_error_is_that_of_the_tokens_but_for_a_constant() -> None:
    weight, x_d, x_c, lacking = tokens_of_a_site()
    drift, (metric, lower) = drift_of(x_d, x_c, lacking), damped_metric()
    left = root_of(metric, 0.0, RootKind.cholesky, "C")
    targets = x_d @ weight.T + lacking

    def by_tokens(change: Tensor) -> float:
        residual = targets - x_c @ (weight + change).T
        return float((residual @ lower).square().sum(1).mean())

    first, second = 0.1 * torch.ones(M, N, dtype=torch.float64), 0.2 * weight
    by_moments = squared_error(first, weight, drift, left) - squared_error(
        second, weight, drift, left
    )
    assert by_moments == pytest.approx(by_tokens(first) - by_tokens(second))


REFITS = [
    Anchored(),
    Anchored(trust=0.5, held_out=0.3),
    Anchored(bias=True, stream=False),
    Anchored(output_metric=False, dense_sites=False),
    Sequential(),
    Sequential(anchored=True),
    Sequential(adaptive=AdaptiveTrust()),
]


def rotated(corrections: Sequence[Correction]) -> list[tuple[Correction, str]]:
    """Return each correction with two families, and each family with some of them."""
    families = cycle(FAMILIES)
    return [(correction, next(families)) for correction in corrections for _ in range(2)]


ANCHORED = [c for c in REFITS if isinstance(c, Anchored)]


@pytest.mark.parametrize(("correction", "family"), rotated(ANCHORED), ids=str)
def test_full_rank_and_no_drift_give_the_weights_back(correction: Correction, family: str) -> None:
    dense = {n: s.weight.detach() for n, s in find_sites(build(family), SiteSelection()).items()}
    result = run(correction, 1.0, family)
    for name, weight in dense.items():
        assert_close(result.model.get_submodule(name).weight.detach(), weight)


@pytest.mark.parametrize(
    ("correction", "whitening"),
    [
        (Anchored(), InputOutput()),
        (Sequential(), Input()),
        (Sequential(anchored=True), Input()),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3"])
def test_where_nothing_has_drifted_a_refit_is_the_truncation(
    family: str, correction: Correction, whitening: Whitening
) -> None:
    """The first sites of the first block read what they read in the dense model.

    Of families without biases: what has one is refitted about the means.
    """
    method = {"whitening": whitening, "allocation": Uniform()}
    refitted = low_rank_layers(run(correction, 0.5, family, **method).model)
    plain = low_rank_layers(run(NoCorrection(), 0.5, family, **method).model)
    first, last = next(iter(plain)), list(plain)[-1]
    assert_close(refitted[first].product(), plain[first].product(), rtol=1e-2, atol=1e-3)
    assert not torch.allclose(refitted[last].product(), plain[last].product(), rtol=1e-2, atol=1e-2)


def test_windows_are_held_out_whatever_the_batch() -> None:
    """Three of nine, in batches of four, or of nine."""
    for batch_size in (4, 9):
        ridges = [
            compress(
                build("llama"),
                TOKENS,
                ratio=0.5,
                method=Method(InputOutput(), Spectral(), Anchored(ridge=ridge, held_out=0.33)),
                batch_size=batch_size,
            ).model.state_dict()
            for ridge in (1e-3, 1e3)
        ]
        for name, tensor in ridges[0].items():  # Chosen there, so what is given says nothing.
            assert torch.equal(tensor, ridges[1][name]), name


@pytest.mark.parametrize(("correction", "family"), rotated(REFITS), ids=str)
def test_ranks_and_the_budget_stay_as_they_were_planned(
    correction: Correction, family: str
) -> None:
    result = run(correction, 0.6, family)
    assert {n: x.rank for n, x in low_rank_layers(result.model).items()} == result.plan.ranks
    kept = stored_bytes(result.model, result.plan.sites) / 4  # Of float32.
    assert kept == result.plan.parameters_kept
    assert kept <= 0.6 * result.plan.parameters_total
    with torch.no_grad():
        assert torch.isfinite(result.model(input_ids=TOKENS).logits).all()


def error_of_blocks(result: Compressed, family: str) -> float:
    """Return how far the hidden states after the last block are from the dense model's."""
    dense = build(family)
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=TOKENS, output_hidden_states=True).hidden_states[-1]
            for model in (result.model, dense)
        )
    return float((ours - theirs).square().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_brings_the_hidden_states_nearer(family: str) -> None:
    plain = error_of_blocks(run(NoCorrection(), 0.6, family), family)
    refitted = error_of_blocks(run(Anchored(ridge=1e-3), 0.6, family), family)
    assert refitted < 0.9 * plain


@pytest.mark.parametrize("quantization", [NoQuantization(), LossAwareRemap(Score.second_order)])
def test_rows_are_rounded_after_the_refit(quantization: Quantization) -> None:
    refitted = run(Anchored(bias=True), 0.4, quantization=quantization)
    plain = run(NoCorrection(), 0.4, quantization=quantization)
    assert error_of_blocks(refitted, "llama") < error_of_blocks(plain, "llama")
    # Stored in 32 bits what counts 16: the plan's bits are those of a half-precision model.
    assert refitted.plan.bits_kept <= 0.4 * refitted.plan.bits_total


def loss_of(result: Compressed) -> float:
    return mean_loss(result.model, TOKENS, 4)


ADAPTERS = Lora(rank=2, learning_rate=3e-3, epochs=3, batch_windows=3)
DISTILLED = Distilled(rank=2, epochs=8, batch_windows=3, held_out=0.25)
SHORT = {"epochs": 4, "learning_rate": 3e-3, "batch_windows": 3, "held_out": 0.0}
REFINED = Ladder(RefitOptions(), Refinement(**SHORT))  # type: ignore[arg-type]
END_TO_END = EndToEnd(**SHORT)  # type: ignore[arg-type]
WHOLE = Ladder(None, Refinement(**SHORT, loss=BlockLoss.kl), END_TO_END)  # type: ignore[arg-type]
TRAINED = [
    ProjectedGradient(),
    ProjectedGradient(rounds=2, replan=False),
    ProjectedGradient(reprofile=True),
    Randomized(),
    ADAPTERS,
    DISTILLED,
    REFINED,
    WHOLE,
    Ladder(end_to_end=END_TO_END),
]
WEIGHTED = WeightedRefit(steps=20)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_lower_the_loss(family: str) -> None:
    assert loss_of(run(ADAPTERS, 0.5, family)) < loss_of(run(NoCorrection(), 0.5, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_goes_on_from_the_refit(family: str) -> None:
    """And the windows on which it is measured here are not those of the calibration."""
    many = torch.randint(0, 31, (96, 12), generator=torch.Generator().manual_seed(2))

    def kl(correction: Correction) -> float:
        method = Method(InputOutput(), Spectral(), correction)
        found = compress(build(family), many, method=method, ratio=0.5, batch_size=16)
        return divergence(build(family), found.model, TOKENS, 4).kl

    assert kl(Distilled(rank=4, epochs=4, batch_windows=16)) < 0.96 * kl(Anchored())


def test_what_does_not_help_on_held_out_windows_is_dropped() -> None:
    kept = run(Anchored(), 0.5).model.state_dict()
    found = run(replace(DISTILLED, learning_rate=30.0), 0.5).model.state_dict()
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(found[name], tensor), name


def test_the_loss_of_distillation_is_the_divergence_that_is_evaluated() -> None:
    dense, compressed = build("llama"), run(Anchored(), 0.5).model
    expected = divergence(dense, compressed, TOKENS, 4).kl
    found = kl_from(dense, compressed, Windows(TOKENS)).item()  # A sum.
    assert found / TOKENS.numel() == pytest.approx(expected, rel=1e-4)
    assert float(kl_from(dense, dense, Windows(TOKENS))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("correction", "family"), rotated([*TRAINED, WEIGHTED]), ids=str)
def test_what_follows_the_loss_keeps_the_budget(correction: Correction, family: str) -> None:
    corrected = run(correction, 0.5, family)
    assert {n: x.rank for n, x in low_rank_layers(corrected.model).items()} == corrected.plan.ranks
    kept = stored_bytes(corrected.model, corrected.plan.sites) / 4
    assert kept == corrected.plan.parameters_kept <= 0.5 * corrected.plan.parameters_total
    for name, parameter in corrected.model.named_parameters():
        assert parameter.requires_grad, name
        assert "lora" not in name


# A step along one direction hangs on more digits of the gradient than bfloat16 has.
HALVES = [
    *((torch.float16, correction) for correction in (Anchored(), *TRAINED)),
    *((torch.bfloat16, correction) for correction in (Anchored(), ADAPTERS, DISTILLED, WHOLE)),
]


@pytest.mark.parametrize(("dtype", "correction"), HALVES, ids=str)
def test_a_model_in_half_precision_is_corrected(dtype: torch.dtype, correction: Correction) -> None:
    """Nearer to what the same does in single precision than the truncation alone is."""

    def logits(dtype: torch.dtype, correction: Correction) -> Tensor:
        model = build("llama", dtype)
        method = Method(InputOutput(), Spectral(), correction)
        compress(model, TOKENS, method=method, ratio=0.5, batch_size=4)
        with torch.no_grad():
            found: Tensor = model(input_ids=TOKENS).logits.float()
        return found

    expected, found = (logits(kind, correction) for kind in (torch.float32, dtype))
    assert torch.isfinite(found).all()
    plain = logits(dtype, NoCorrection())
    assert (found - expected).norm() < 0.7 * (plain - expected).norm()


def test_the_projection_is_the_nearest_point_along_the_gradient() -> None:
    weight, statistics = random_statistics(M, N)
    truncated, gradient = 0.8 * weight.roll(1), statistics.need("gradient")
    found = moved(weight, truncated, gradient)
    distances = [
        float((truncated + step * gradient - weight).norm()) for step in torch.linspace(-3, 3, 6001)
    ]
    assert float((found - weight).norm()) <= min(distances) + 1e-12
    assert_close(moved(truncated, truncated, gradient), truncated)
    assert_close(moved(weight, truncated, torch.zeros_like(gradient)), truncated)


def test_a_round_of_the_projection_is_what_its_formula_says() -> None:
    """By hand, with a gradient that autograd takes of the whole model's loss."""
    model = build("llama")
    sites = find_sites(model, SiteSelection())
    name = "model.layers.1.mlp.up_proj"
    plain = run(NoCorrection(), 0.5, whitening=Identity(), allocation=Uniform())
    dense = {n: s.weight.detach().clone() for n, s in sites.items()}
    for site, layer in low_rank_layers(plain.model).items():
        sites[site].weight.data = layer.product().detach()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradient, truncated = sites[name].weight.grad, sites[name].weight.detach()
    assert gradient is not None
    step = (gradient * (dense[name] - truncated)).sum() / gradient.square().sum()
    u, s, vh = torch.linalg.svd((truncated + step * gradient).double(), full_matrices=False)
    rank = plain.plan.ranks[name]
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    correction = ProjectedGradient(replan=False)
    found = run(correction, 0.5, whitening=Identity(), allocation=Uniform())
    assert found.plan.ranks == plain.plan.ranks
    product = low_rank_layers(found.model)[name].product()
    assert_close(product.detach(), expected.float(), rtol=1e-3, atol=1e-4)


def test_a_round_may_profile_the_model_that_has_moved() -> None:
    """By hand: all weights moved first, then the inputs of each site in that model."""
    model = build("llama")
    sites = find_sites(model, SiteSelection())
    plain = run(NoCorrection(), 0.5, whitening=Input(), allocation=Uniform())
    dense = {n: s.weight.detach().clone() for n, s in sites.items()}
    for site, layer in low_rank_layers(plain.model).items():
        sites[site].weight.data = layer.product().detach()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for site in low_rank_layers(plain.model):
        gradient, truncated = sites[site].weight.grad, sites[site].weight.detach()
        assert gradient is not None
        step = (gradient * (dense[site] - truncated)).sum() / gradient.square().sum()
        sites[site].weight.data = truncated + step * gradient
    name = "model.layers.1.mlp.up_proj"
    seen: list[Tensor] = []
    sites[name].register_forward_pre_hook(lambda m, x: seen.append(x[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=TOKENS)
    x = seen[0].double()
    root = torch.linalg.cholesky(x.T @ x)
    u, s, vh = torch.linalg.svd(sites[name].weight.detach().double() @ root, full_matrices=False)
    rank = plain.plan.ranks[name]
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
    correction = ProjectedGradient(replan=False, reprofile=True)
    found = run(correction, 0.5, whitening=Input(), allocation=Uniform())
    once = run(ProjectedGradient(replan=False), 0.5, whitening=Input(), allocation=Uniform())
    error, otherwise = (
        float((low_rank_layers(one.model)[name].product() - expected).norm())
        for one in (found, once)
    )
    assert error < 0.05 * otherwise


def test_replanning_with_an_allocation_that_measures_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"correction\.replan=false"):
        run(ProjectedGradient(), allocation=SensitivitySearch())


def test_adapters_are_drawn_by_the_seed() -> None:
    losses = [loss_of(run(Lora(seed=seed, learning_rate=1e-2), 0.5)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_every_correction_is_tested_here() -> None:
    tested = {type(c) for c in (*REFITS, *TRAINED, WEIGHTED)}
    assert tested | {NoCorrection} == set(all_variants(iosvd.correction))


@dataclass(frozen=True)
class Watched(Correction):
    """Carries out another correction and sees that the dense model is as it was."""

    inner: Correction

    @property
    def needs_metrics(self) -> bool:
        return self.inner.needs_metrics

    @property
    def adds_bias(self) -> bool:
        return self.inner.adds_bias

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        model = inputs.calibration.model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modules = dict(model.named_modules())
        result = self.inner(inputs)
        assert dict(model.named_modules()) == modules
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert all(parameter.requires_grad for parameter in model.parameters())
        dense = {parameter.data_ptr() for parameter in model.parameters()}
        for name, site in result.sites.items():
            if site.factors is not None:
                assert site.factors.left.data_ptr() not in dense, name
        return result


@pytest.mark.parametrize("correction", [*REFITS, *TRAINED, WEIGHTED], ids=str)
@pytest.mark.parametrize("family", ["llama_tied", "opt"])
def test_a_correction_leaves_the_dense_model_as_it_is(family: str, correction: Correction) -> None:
    watched, plain = (run(one, 0.6, family) for one in (Watched(correction), correction))
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(watched.model.state_dict()[name], tensor), name


@dataclass(frozen=True)
class Freed(NoQuantization):
    """Sees, when the compressed sites are installed, which dense weights are still in memory."""

    dense: Mapping[str, weakref.ref]
    model: nn.Module

    def __call__(self, sites: Mapping[str, Site], limit: int, dtype: torch.dtype) -> dict:
        gc.collect()
        layers = low_rank_layers(self.model)
        assert layers
        for name, layer in layers.items():
            assert self.dense[name]() is None, name
            if not isinstance(sites, TruncatedSites):  # They compute their factors every time.
                factors = sites[name].factors
                assert factors is not None
                assert factors.left.data_ptr() == layer.left.data_ptr(), name
        return super().__call__(sites, limit, dtype)


@pytest.mark.parametrize("correction", [NoCorrection(), *REFITS, *TRAINED, WEIGHTED], ids=str)
def test_dense_weights_are_freed_before_rows_are_rounded(correction: Correction) -> None:
    model = build("llama")
    dense = {
        name: weakref.ref(site.weight) for name, site in find_sites(model, SiteSelection()).items()
    }
    method = Method(InputOutput(), Spectral(), correction, Freed(dense, model))
    compress(model, TOKENS, method=method, ratio=0.5, batch_size=4)
