"""compress() as a whole, on every family: its budget, its options, and what it leaves alone."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, all_variants, build, divided
from torch import Tensor
from torch.testing import assert_close

import iosvd.allocation
import iosvd.whitening
from iosvd.allocation import Allocation, Hull, LossAware, Spectral, TypeGrouped, Uniform, ZeroSum
from iosvd.budget import Budget, Shape
from iosvd.errors import BudgetError, ConfigError, NumericalError
from iosvd.factorization import Algorithm, Factorization, truncate
from iosvd.layers.replacement import check_finite, compressed_layers, install_, low_rank_layers
from iosvd.linalg import IdentityRoot
from iosvd.method import Method
from iosvd.models.sites import SiteSelection, find_sites
from iosvd.pipeline import Compressed, compress, factorize
from iosvd.plan import make_plan
from iosvd.quantization import (
    LossAwareRemap,
    NoQuantization,
    Quantization,
    Remap,
    RoundToNearest,
)
from iosvd.statistics.collect import collect
from iosvd.statistics.memory import MemoryUse, in_groups
from iosvd.truncation import TruncatedSites
from iosvd.types import Site, Spectrum, Whitener
from iosvd.whitening import Asvd, Identity, Input, InputOutput, Whitening

TOKENS = torch.randint(0, 31, (8, 12), generator=torch.Generator().manual_seed(1))


def run(family: str = "llama", ratio: float = 0.6, **options: object) -> Compressed:
    return compress(build(family), TOKENS, ratio=ratio, **divided(options))


# Every pair on one family; every family meets many whitenings and allocations.
CASES = [
    (list(FAMILIES)[(first + second) % len(FAMILIES)], whitening, allocation)
    for first, whitening in enumerate(all_variants(iosvd.whitening))
    for second, allocation in enumerate(all_variants(iosvd.allocation))
]


@pytest.mark.parametrize(("family", "whitening", "allocation"), CASES)
def test_every_method_meets_its_budget_on_every_family(
    family: str, whitening: type[Whitening], allocation: type[Allocation]
) -> None:
    dense = build(family)
    sites = find_sites(dense, SiteSelection())
    total = sum(site.weight.numel() for site in sites.values())
    result = run(family, 0.6, whitening=whitening(), allocation=allocation())
    low_rank = low_rank_layers(result.model)
    kept = sum(
        low_rank[n].weight.numel() + low_rank[n].left.numel() if n in low_rank else s.weight.numel()
        for n, s in sites.items()
    )
    assert kept == result.plan.parameters_kept
    assert kept <= 0.6 * total
    assert 0.6 * total - kept < max(sum(site.weight.shape) for site in sites.values())
    with torch.no_grad():
        assert torch.isfinite(result.model(input_ids=TOKENS).logits).all()


def test_untouched_parameters_stay_bit_for_bit() -> None:
    dense = dict(build("qwen2").named_parameters())
    result = run("qwen2", 0.7)
    changed = set(low_rank_layers(result.model))
    assert changed
    for name, parameter in result.model.named_parameters():
        site, _, part = name.rpartition(".")
        if site not in changed or part == "bias":
            assert torch.equal(parameter, dense[name])
            assert parameter.dtype == dense[name].dtype


def test_ratio_one_changes_nothing() -> None:
    result = run(ratio=1.0)
    assert not low_rank_layers(result.model)
    with torch.no_grad():
        expected = build("llama")(input_ids=TOKENS).logits
        assert torch.equal(result.model(input_ids=TOKENS).logits, expected)


def weights(result: Compressed) -> dict[str, torch.Tensor]:
    return {name: layer.product() for name, layer in compressed_layers(result.model).items()}


@pytest.mark.parametrize("quantization", [NoQuantization(), LossAwareRemap()], ids=str)
@pytest.mark.parametrize("limit", [10_000, 3000, 0])
def test_passes_change_nothing(limit: float, quantization: Quantization) -> None:
    """To the bit: a site's statistics do not hang on which others are collected with it."""
    one = run(allocation=LossAware(), quantization=quantization)
    memory = MemoryUse(limit_bytes=limit)
    several = run(allocation=LossAware(), quantization=quantization, memory=memory)
    assert several.plan == one.plan
    for name, weight in weights(several).items():
        assert torch.equal(weight, weights(one)[name])


def test_groups_divide_the_sites_in_order() -> None:
    sites = list(find_sites(build("llama"), SiteSelection()))
    for limit, expected in ((0, 14), (3, 5), (100, 1)):
        groups = in_groups(sites, len, limit)
        assert len(groups) == expected
        assert all(len(group) <= max(1, limit) for group in groups)
        assert [name for group in groups for name in group] == sites


def test_statistics_that_lack_what_is_needed_say_so() -> None:
    model = build("llama")
    found = collect(model, TOKENS, find_sites(model, SiteSelection()), LossAware().needs)
    with pytest.raises(ConfigError, match=r"q_proj have no input_metric; collect them with needs="):
        InputOutput()(next(iter(found.values())))


def test_both_algorithms_agree() -> None:
    one, other = (run(factorization=Factorization(algorithm)) for algorithm in Algorithm)
    assert one.plan.ranks == other.plan.ranks
    for name, weight in weights(one).items():
        assert_close(weight, weights(other)[name], rtol=1e-4, atol=1e-5)


def test_plain_svd_is_torch_svd() -> None:
    dense = build("llama")
    result = run(whitening=Identity(), allocation=Uniform(), ratio=0.5)
    for name, weight in weights(result).items():
        u, s, vh = torch.linalg.svd(dense.get_submodule(name).weight.detach().double())
        rank = result.plan.ranks[name]
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert_close(weight, expected.float(), rtol=1e-4, atol=1e-5)


def test_the_same_run_twice_is_the_same_to_the_bit() -> None:
    one, other = run(allocation=LossAware()), run(allocation=LossAware())
    assert one.plan == other.plan
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, dict(other.model.named_parameters())[name])


def test_errors_name_the_cause_before_work_is_done() -> None:
    with pytest.raises(BudgetError, match="below"):
        run(ratio=0.01)
    broken = build("llama")
    broken.get_submodule("model.layers.0.mlp.up_proj").weight.data[0] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.up_proj"):
        compress(broken, TOKENS, ratio=0.5, method=Method(InputOutput(), Spectral()))


def test_a_dead_site_is_named() -> None:
    """Nothing downstream depends on v where o is zero, so its KL metric is."""
    model = build("llama")
    model.get_submodule("model.layers.1.self_attn.o_proj").weight.data.zero_()
    with pytest.raises(NumericalError, match=r"KL metric of model\.layers\.1\.self_attn\.q_proj"):
        compress(model, TOKENS, ratio=0.5, method=Method(InputOutput(), Spectral()))
    selection = SiteSelection(exclude=["*.1.self_attn.*"])
    compress(
        model,
        TOKENS,
        ratio=0.5,
        method=Method(InputOutput(), Spectral()),
        selection=selection,
    )


def test_given_spectra_need_no_model_call() -> None:
    spectra = factorize(build("llama"), TOKENS, method=Method(InputOutput(), LossAware()))
    model = build("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    reused = compress(
        model,
        TOKENS,
        ratio=0.6,
        method=Method(InputOutput(), LossAware()),
        factorized=spectra,
    )
    assert reused.plan == run(allocation=LossAware()).plan
    assert reused.stages["statistics"] == spectra.stages["statistics"]


def test_spectra_that_were_not_scored_say_so() -> None:
    spectra = factorize(build("llama"), TOKENS, method=Method(InputOutput(), Spectral()))
    with pytest.raises(ConfigError, match=r"q_proj has no loss_change; factorize with the alloc"):
        run(allocation=LossAware(), factorized=spectra)


def test_the_gradient_may_come_from_windows_of_its_own() -> None:
    """Whitening as of the first half alone, scores as of the second half in the same metrics."""
    first, second = TOKENS[:4], TOKENS[4:]
    options = {"method": Method(InputOutput(), LossAware())}
    halves = factorize(build("llama"), first, gradient_tokens=second, **options)  # type: ignore[arg-type]
    whole = factorize(build("llama"), first, **options)  # type: ignore[arg-type]
    model = build("llama")
    sites = find_sites(model, SiteSelection())
    gradients = collect(model, second, sites, LossAware().needs)
    for name, spectrum in halves.spectra.items():
        assert_close(spectrum.sigma, whole.spectra[name].sigma)
        gradient = gradients[name].gradient
        assert gradient is not None
        rank = spectrum.left.shape[1]
        along = torch.einsum("mr,mn,rn->r", spectrum.left, gradient, spectrum.right)
        assert spectrum.loss_change is not None
        assert_close(spectrum.loss_change[:rank].float(), -along, rtol=1e-3, atol=1e-6)


def test_a_target_is_met_by_the_smallest_ratio() -> None:
    whitening = InputOutput(top_k=0)
    result = run(ratio=None, target_kl=0.02, whitening=whitening)  # type: ignore[arg-type]
    assert result.plan.predicted_kl is not None
    assert result.plan.predicted_kl <= 0.02
    found = result.plan.ratio_asked
    below = run(ratio=found - 2e-4, whitening=whitening).plan.predicted_kl
    assert below is not None and below > 0.02
    same = run(ratio=found, whitening=whitening)
    assert same.plan.sites == result.plan.sites


@pytest.mark.parametrize("options", [{"ratio": None}, {"ratio": 0.5, "target_kl": 0.1}])
def test_a_ratio_or_a_target(options: dict[str, float | None]) -> None:
    with pytest.raises(ConfigError, match="either a ratio or a target_kl"):
        run(**options)  # type: ignore[arg-type]


def test_spectra_that_were_cut_too_low_are_refused() -> None:
    """Remapping plans ranks above the break-even of 16 bits, at which these spectra end."""
    model = build("llama")
    cut = factorize(model, TOKENS, method=Method(InputOutput(), Spectral()))
    with pytest.raises(ConfigError, match=r"is asked of a spectrum that keeps .* components"):
        run(ratio=0.95, quantization=Remap(), factorized=cut)
    whole = factorize(model, TOKENS, method=Method(InputOutput(), Spectral(), quantization=Remap()))
    assert run(ratio=0.95, quantization=Remap(), factorized=whole).plan.sites


def test_a_target_needs_the_whole_kl_metric_and_no_rounding() -> None:
    for options in (
        {"whitening": InputOutput()},
        {"whitening": InputOutput(top_k=0, output_metric_roles=["mlp.*"])},
        {"whitening": InputOutput(top_k=0), "quantization": Remap()},
    ):
        with pytest.raises(ConfigError, match="target_kl needs"):
            run(ratio=None, target_kl=0.1, **options)  # type: ignore[arg-type]


def test_a_restricted_output_metric_predicts_no_kl() -> None:
    restricted = InputOutput(output_metric_roles=["mlp.*"])
    assert run(whitening=restricted).plan.predicted_kl is None
    assert run(whitening=InputOutput(renormalize=True)).plan.predicted_kl is None
    assert run(whitening=InputOutput()).plan.predicted_kl is not None


@pytest.mark.parametrize("whitening", [Identity(), Asvd()], ids=lambda w: type(w).__name__)
def test_dead_channels_and_weights_of_zeros_are_compressed(whitening: Whitening) -> None:
    """A tall weight of which few inputs are alive has fewer components than ranks."""
    model = build("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[:, 2:] = 0
        model.get_submodule("model.layers.1.mlp.gate_proj").weight.zero_()
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    few = SiteSelection(include=["*.0.mlp.up_proj", "*.1.mlp.gate_proj"])
    result = compress(model, TOKENS, ratio=0.9, method=Method(whitening, Uniform()), selection=few)
    assert all(site.rank > 2 and not site.dense for site in result.plan.sites.values())
    with torch.no_grad():
        assert_close(model(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("quantization", "ratio"), [(NoQuantization(), 1.0), (RoundToNearest(), 0.6)], ids=["16", "8"]
)
def test_what_stays_dense_is_not_factorised(
    quantization: Quantization, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"whitening": Identity(), "allocation": Uniform(), "quantization": quantization}
    whole = factorize(build("llama"), TOKENS, **divided(method))
    assert all(len(spectrum.sigma) for spectrum in whole.spectra.values())
    usual = run("llama", ratio, factorized=whole, **method)
    monkeypatch.setattr(Factorization, "__call__", lambda *_: pytest.fail("factorised"))
    direct = run("llama", ratio, **method)
    assert direct.plan == usual.plan
    assert all(site.dense for site in direct.plan.sites.values())
    for (name, one), (_, two) in zip(
        direct.model.state_dict().items(), usual.model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, two), name


def test_a_weight_of_zeros_is_not_called_a_site_without_tokens() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.v_proj").weight.zero_()
    message = r"input metric of model\.layers\.0\.self_attn\.o_proj is zero: .* weight of zeros"
    with pytest.raises(NumericalError, match=message):
        compress(model, TOKENS, ratio=0.6, method=Method(Input(), Uniform()))


def test_factors_beyond_the_range_of_the_dtype_are_not_installed() -> None:
    model = build("llama", torch.float16)
    site = model.get_submodule("model.layers.0.mlp.up_proj")
    factors = truncate(
        Factorization()(site.weight, Whitener(IdentityRoot(), IdentityRoot()), "site"), 3
    )
    beyond = replace(factors, left=factors.left * 1e6)
    install_(model, {"model.layers.0.mlp.up_proj": Site("site", site.weight, beyond, None, None)})  # type: ignore[arg-type]
    message = r"left of model\.layers\.0\.mlp\.up_proj has NaN or infinity in float16; try model"
    with pytest.raises(NumericalError, match=message):
        check_finite(model)


def of_many_sites(count: int) -> tuple[dict[str, Spectrum], Budget]:
    """Spectra as a mixture of experts has them: many small sites."""
    m, n, generator = 12, 8, torch.Generator().manual_seed(0)  # So small that caches hold them.

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    spectra = {}
    for number in range(count):
        sigma = random(n).sort(descending=True).values
        spectra[f"model.layers.{number // 7}.experts.{number % 7}.up_proj"] = Spectrum(
            left=random(m, n),
            right=random(n, n),
            sigma=sigma,
            left_energy=torch.ones(n),
            right_energy=sigma**2,
            output_diagonal=torch.ones(m),
            input_diagonal=torch.ones(n),
            damping_output=0.0,
            damping_input=0.0,
            loss_change=random(n) - 0.5,
        )
    return spectra, Budget({name: Shape(m, n) for name in spectra}, 0.6)


class _Counted:
    """A trial that knows the size of its calibration set, and is not asked for more."""

    tokens = 1000


def test_allocation_and_plan_grow_with_the_sites_and_no_faster() -> None:
    """Four times as many sites may take five times as long; squared it would be sixteen."""
    allocations = [Uniform(), Spectral(), LossAware(), ZeroSum(), TypeGrouped(), Hull()]

    def seconds(count: int) -> float:
        spectra, budget = of_many_sites(count)
        sites = {name: torch.nn.Linear(8, 12) for name in spectra}
        started = time.process_time()
        for allocation in allocations:
            fresh = replace(budget)  # Without the costs that were computed before.
            ranks = allocation(spectra, fresh, _Counted())  # type: ignore[arg-type]
            assert make_plan(ranks, spectra, fresh, kl=True).bits_kept <= fresh.limit
            assert all(TruncatedSites(ranks, sites, spectra, fresh).values())
        return time.process_time() - started

    few = many = math.inf
    for _ in range(8):  # Whatever else the machine does only adds to it.
        few, many = min(few, seconds(245)), min(many, seconds(1001))
        if many <= 5 * few:
            break
    assert many <= 5 * few, f"{few:.2f} s for 245 sites, {many:.2f} s for 1001"
    assert many < 2 * len(allocations), f"{many:.2f} s for {len(allocations)} allocations"
