"""One pass of hooks against direct computations, on every model family."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, build
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import PreTrainedModel

from iosvd.budget import Shape
from iosvd.errors import ModelError, NumericalError
from iosvd.models.sites import SiteSelection, find_sites, shared_inputs
from iosvd.statistics.collect import _ends, collect
from iosvd.statistics.fisher import FisherMetric
from iosvd.statistics.kl_metric import KLMetric
from iosvd.statistics.memory import statistics_bytes
from iosvd.statistics.needs import STATISTICS, Needs, SiteStatistics, statistics_for
from iosvd.windows import Windows

EVERYTHING = Needs(
    input_metric=True,
    input_magnitude=True,
    kl_metric=KLMetric(5),
    fisher_metric=FisherMetric(),
    fisher_rows=True,
    fisher_elements=True,
    kronecker_passes=3,
    gradient_windows=10**9,
)
families = pytest.mark.parametrize("family", FAMILIES)


def tokens(windows: int = 6) -> Tensor:
    return torch.randint(0, 31, (windows, 12), generator=torch.Generator().manual_seed(1))


def inputs_of(model: PreTrainedModel, name: str) -> Tensor:
    """What one site reads, found with a hook of its own."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        model(input_ids=tokens())
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])  # OPT's MLP flattens windows by itself.


@families
def test_means_agree_with_direct_computation(family: str) -> None:
    model = build(family, torch.float64)
    sites = find_sites(model, SiteSelection())
    found = collect(model, tokens(), sites, EVERYTHING, batch_size=4)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    logits = model(input_ids=tokens()).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    for name, site in sites.items():
        x = inputs_of(model, name)
        assert_close(found[name].input_metric, x.T @ x / len(x))
        assert_close(found[name].input_magnitude, x.abs().mean(0))
        assert_close(found[name].gradient, site.weight.grad)


def same(one: dict[str, SiteStatistics], other: dict[str, SiteStatistics]) -> None:
    for name in one:
        for field in STATISTICS:
            assert_close(getattr(one[name], field), getattr(other[name], field))


def test_batches_change_nothing() -> None:
    model = build("llama", torch.float64)
    sites = find_sites(model, SiteSelection())
    needs = replace(EVERYTHING, gradient_windows=3)
    one, other = (collect(model, tokens(), sites, needs, batch_size=size) for size in (1, 4))
    same(one, other)


def test_a_subset_of_sites_has_the_same_statistics() -> None:
    model = build("llama", torch.float64)
    sites = find_sites(model, SiteSelection())
    names = list(sites)[1::3]  # Without the first of each group that shares an input.
    everything = collect(model, tokens(), sites, EVERYTHING)
    subset = collect(model, tokens(), {name: sites[name] for name in names}, EVERYTHING)
    assert list(subset) == names
    same(subset, everything)


def test_sites_that_read_the_same_tensor_share_its_metric() -> None:
    model = build("llama")
    found = collect(model, tokens(), find_sites(model, SiteSelection()), EVERYTHING)
    metrics = {name.removeprefix("model.layers."): s.input_metric for name, s in found.items()}
    assert metrics["0.self_attn.q_proj"] is metrics["0.self_attn.k_proj"]
    assert metrics["0.self_attn.q_proj"] is metrics["0.self_attn.v_proj"]
    assert metrics["0.mlp.gate_proj"] is metrics["0.mlp.up_proj"]
    assert metrics["0.mlp.gate_proj"] is not metrics["0.self_attn.q_proj"]
    assert metrics["0.mlp.gate_proj"] is not metrics["1.mlp.gate_proj"]


def test_gradient_windows_are_the_first_ones() -> None:
    model = build("llama", torch.float64)
    sites = find_sites(model, SiteSelection())
    few = collect(model, tokens(), sites, Needs(gradient_windows=2), batch_size=4)
    alone = collect(model, tokens()[:2], sites, Needs(gradient_windows=2))
    for name in sites:
        assert_close(few[name].gradient, alone[name].gradient)
        assert few[name].input_metric is None


@families
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = build(family).train()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    collect(model, tokens(), find_sites(model, SiteSelection()), EVERYTHING)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (parameter is not frozen)
        assert torch.equal(parameter, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_asked_for_costs_no_forward_pass() -> None:
    model = build("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    found = collect(model, tokens(), find_sites(model, SiteSelection()), Needs())
    assert all(s == SiteStatistics(name) for name, s in found.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32_without_underflow(dtype: torch.dtype) -> None:
    exact = build("llama", torch.float64)
    half = build("llama", dtype)
    found = collect(half, tokens(), find_sites(half, SiteSelection()), EVERYTHING)
    expected = collect(exact, tokens(), find_sites(exact, SiteSelection()), EVERYTHING)
    for name, statistics in found.items():
        for field in STATISTICS:
            value, reference = getattr(statistics, field), getattr(expected[name], field)
            assert value.dtype == torch.float32
            if field == "input_metric":  # The others hang on which tokens are the top five.
                error = (value - reference).norm() / reference.norm()
                assert error < 0.1


def test_the_site_where_infinity_begins_is_named() -> None:
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = torch.inf
    sites = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    with pytest.raises(NumericalError, match=r"inputs of model\.layers\.1\.mlp\.down_proj"):
        collect(model, tokens(), sites, EVERYTHING)  # type: ignore[arg-type]


def test_a_site_the_forward_pass_does_not_reach_is_named() -> None:
    model = build("llama")
    model.model.layers[0].unused = torch.nn.Linear(16, 16)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.unused is not used.*exclude"):
        collect(model, tokens(), find_sites(model, SiteSelection()), EVERYTHING)


@families
def test_stated_memory_is_what_is_kept(family: str) -> None:
    model = build(family)
    sites = find_sites(model, SiteSelection())
    found = collect(model, tokens(), sites, EVERYTHING)
    kept = {
        getattr(s, field).data_ptr(): getattr(s, field).nbytes
        for s in found.values()
        for field in STATISTICS
    }
    shapes = {name: Shape(*site.weight.shape) for name, site in sites.items()}
    # The running sum of the Kronecker factors is let go of at the end.
    sums = sum(4 * max(s.m, s.n) ** 2 for s in shapes.values())
    shared = shared_inputs(model, Windows(tokens()), sites)
    assert sum(kept.values()) == statistics_bytes(shapes, EVERYTHING, shared) - sums


@families
def test_a_statistic_does_not_hang_on_what_is_collected_with_it(family: str) -> None:
    """To the bit: or a sweep's table would hang on which of its runs came first."""
    model = build(family)
    sites = find_sites(model, SiteSelection())
    together = collect(model, tokens(), sites, EVERYTHING)
    for part, needs in EVERYTHING.parts().items():
        alone = collect(model, tokens(), sites, needs)
        for name in sites:
            for field in statistics_for(part):
                found = getattr(alone[name], field)
                assert torch.equal(found, getattr(together[name], field)), (name, field)


@pytest.mark.parametrize("inputs", [True, False])
def test_only_the_windows_of_the_gradient_are_differentiated(
    inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others pass without a graph, or not at all if nothing of them is asked for."""
    model = build("llama")
    sites = find_sites(model, SiteSelection())
    graphs: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda *call: graphs.append(call[-1].requires_grad))
    monkeypatch.setattr("iosvd.statistics.passes.chained_blocks", lambda model, tokens: [])
    needs = Needs(input_metric=inputs, gradient_windows=1)
    found = collect(model, tokens(6), sites, needs, batch_size=2)
    passes = graphs[-4:] if inputs else graphs[-1:]  # Windows 0, 1 and 2, 3 and 4, 5.
    assert passes == ([True, False, False, False] if inputs else [True])
    assert graphs.count(True) == 1
    alone = collect(model, tokens(6)[:1], sites, Needs(gradient_windows=1))
    for name, one in found.items():
        assert_close(one.need("gradient"), alone[name].need("gradient"))


@pytest.mark.parametrize(
    ("windows", "size", "scored"),
    [(6, 2, 1), (6, 4, 6), (5, 2, 3), (4, 8, 0), (4, 2, 9), (3, 1, 2)],
)
def test_batches_cover_the_windows_and_end_with_the_scored_ones(
    windows: int, size: int, scored: int
) -> None:
    ends = _ends(windows, size, scored)
    sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
    assert sum(sizes) == windows and all(0 < one <= size for one in sizes)
    assert min(scored, windows) in (0, *ends)
