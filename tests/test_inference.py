"""A prepared model generates what the same model generates unprepared, from a smaller cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

import iosvd
from experiments.small_models import small_model
from iosvd.errors import ConfigError, ModelError
from iosvd.inference.attention import GenerationAttention
from iosvd.inference.cache import held_bytes
from iosvd.inference.memory import cache_bytes_per_token, check_fits
from iosvd.inference.packed import PackedMLP
from iosvd.layers.modules import LowRankLinear
from iosvd.layers.replacement import compressed_layers
from iosvd.layers.rows import store_rows
from iosvd.models.loading import Dtype, Model, load_model
from iosvd.models.sites import SiteSelection, find_sites

NEW = 32  # Tokens.
CACHES = [("full", "full"), ("latent", "full"), ("full", "latent"), ("latent", "latent")]
KINDS = ("qwen2", "qwen3", "gemma", "granite", "apertus")
SLIDING = ("mistral", "starcoder2", "ministral")


def low_rank_(model: PreTrainedModel, share: float = 0.4, skip: str = "-") -> PreTrainedModel:
    """Put random layers of two factors in place of the sites whose names do not end in `skip`."""
    torch.manual_seed(0)
    for name, site in find_sites(model, SiteSelection()).items():
        if name.endswith(skip):
            continue
        m, n = site.weight.shape
        rank = max(1, int(share * min(m, n))) + len(name) % 3  # Ranks that differ.
        layer = LowRankLinear(n, m, rank, bias=site.bias is not None, dtype=site.weight.dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.set_submodule(name, layer)
    return model.eval()


def prompts(model: PreTrainedModel, batch: int = 8) -> dict[str, Tensor]:
    """Return prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, model.config.vocab_size, (batch, 12), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(batch):
        mask[row, : row % 5 * 2] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generated(model: PreTrainedModel, new: int = NEW, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens and the logits (steps, rows, vocabulary) of a generation."""
    torch.manual_seed(2)
    found = model.generate(
        **prompts(model),
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **options},
    )
    return found.sequences, torch.stack(found.logits)


def assert_same(one: PreTrainedModel, other: PreTrainedModel, **options: Any) -> None:
    (tokens, logits), (tokens2, logits2) = generated(one, **options), generated(other, **options)
    assert torch.equal(tokens, tokens2)
    assert float((logits - logits2).abs().max()) < 1e-4


def attention_modules(model: nn.Module) -> list[GenerationAttention]:
    return [m for m in model.modules() if isinstance(m, GenerationAttention)]


@pytest.mark.parametrize("kind", KINDS)
def test_architectures_generate_the_same(kind: str) -> None:
    model = low_rank_(small_model(kind))
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    assert_same(model, prepared)
    assert_same(model, prepared, cache_implementation="static")


@pytest.mark.parametrize(("v_cache", "k_cache"), CACHES)
def test_every_cache_generates_the_same(v_cache: str, k_cache: str) -> None:
    model = low_rank_(small_model("llama"))
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), v_cache, k_cache)
    modules = attention_modules(prepared)
    assert {m.latent_v for m in modules} == {v_cache == "latent"}
    assert {m.latent_k for m in modules} == {k_cache == "latent"}
    assert_same(model, prepared)
    assert_same(model, prepared, cache_implementation="static")
    assert_same(model, prepared, num_beams=3)
    assert_same(model, prepared, do_sample=True)


@pytest.mark.parametrize("kind", ["gemma", "qwen2"])
def test_few_values_are_folded_into_the_output(kind: str) -> None:
    """With one head of values and a small rank, one product replaces U_v and o_proj's right."""
    model = low_rank_(small_model(kind, num_key_value_heads=1), share=0.3)
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent")
    assert all(module._folded is not None for module in attention_modules(prepared))
    assert_same(model, prepared)
    many = iosvd.prepare_for_generation(low_rank_(small_model(kind), share=0.8), "latent")
    assert all(module._folded is None for module in attention_modules(many))


@pytest.mark.parametrize("kind", SLIDING)
def test_sliding_windows_keep_their_keys(kind: str) -> None:
    model = low_rank_(small_model(kind, sliding_window=8))
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent")
    assert_same(model, prepared)
    assert_same(model, prepared, cache_implementation="static")
    with pytest.raises(ModelError, match=r"attention slides.*k_cache=full"):
        iosvd.prepare_for_generation(model, k_cache="latent")


@pytest.mark.parametrize("folder", ["babyllama-1.0M-tok361", "books-6M"])
def test_trained_models_generate_the_same(folder: str) -> None:
    described = Model(folder, path=str(shared("models", folder)), dtype=Dtype.float32, seq_len=256)
    model = load_model(described)
    for name, site in find_sites(model, SiteSelection()).items():
        u, s, v = torch.linalg.svd(site.weight.detach(), full_matrices=False)
        rank = max(1, int(0.5 * site.weight.numel() / sum(site.weight.shape)))
        layer = LowRankLinear(site.in_features, site.out_features, rank)
        layer.left = nn.Parameter(u[:, :rank] * s[:rank])
        layer.weight = nn.Parameter(v[:rank].contiguous())
        model.set_submodule(name, layer)
    for v_cache, k_cache in CACHES[1:]:
        prepared = iosvd.prepare_for_generation(copy.deepcopy(model), v_cache, k_cache)
        assert_same(model, prepared, new=256)


@pytest.mark.parametrize("skip", ["v_proj", "k_proj", "q_proj", "o_proj"])
def test_dense_sites_are_cached_as_usual(skip: str) -> None:
    model = low_rank_(small_model("qwen2"), skip=skip)
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    modules = attention_modules(prepared)
    assert {m.latent_v for m in modules} == {skip != "v_proj"}
    assert {m.latent_k for m in modules} == {skip != "k_proj"}
    assert_same(model, prepared)


@pytest.mark.parametrize("by_output", [True, False])
def test_int8_rows_generate_the_same(by_output: bool) -> None:
    model = low_rank_(small_model("llama"))
    for name, layer in compressed_layers(model).items():
        assert isinstance(layer, LowRankLinear)
        stored = {}
        for part in layer.shapes:
            matrix = layer.matrix(part).detach()
            int8 = torch.arange(matrix.shape[0 if by_output else 1]) % 3 == 0
            stored[part] = store_rows(matrix, int8, torch.float16, by_output, name)
        layouts = {part: layout for part, (_, layout) in stored.items()}
        new = LowRankLinear(layer.in_features, layer.out_features, layer.rank, layouts=layouts)
        for part, (rows, _) in stored.items():
            for mine, theirs in zip(new.rows(part), rows, strict=True):
                if mine is not None:
                    mine.detach().copy_(theirs)
        model.set_submodule(name, new)
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    assert_same(model, prepared)


@pytest.mark.parametrize(("v_cache", "k_cache"), CACHES)
def test_the_cache_has_the_bytes_of_the_ranks(v_cache: str, k_cache: str) -> None:
    model = low_rank_(small_model("llama"))
    layers = compressed_layers(model)
    kept = {"full": lambda layer: layer.out_features, "latent": lambda layer: layer.rank}
    entries = sum(
        kept[kind](layer)
        for name, layer in layers.items()
        for part, kind in (("k_proj", k_cache), ("v_proj", v_cache))
        if name.endswith(part)
    )
    prepared = iosvd.prepare_for_generation(model, v_cache, k_cache)
    cache = DynamicCache()
    prepared(**prompts(prepared, batch=3), past_key_values=cache)
    assert held_bytes(cache) == 4 * entries * 3 * 12
    assert cache_bytes_per_token(prepared) == 4 * entries
    static = StaticCache(config=prepared.config, max_cache_len=20)
    prepared(**prompts(prepared, batch=3), past_key_values=static)
    assert held_bytes(static) == 4 * entries * 3 * 20


def test_a_compiled_step_is_the_uncompiled_one() -> None:
    model = low_rank_(small_model("llama", num_hidden_layers=1))
    prepared = iosvd.prepare_for_generation(model, "latent", "latent")
    tokens = prompts(prepared)["input_ids"]
    found = []
    for step in (prepared.forward, torch.compile(prepared.forward, fullgraph=True)):
        cache = StaticCache(config=prepared.config, max_cache_len=32)
        logits = [prepared(input_ids=tokens, past_key_values=cache).logits[:, -1:]]
        for place in range(12, 15):
            positions = torch.full((len(tokens), 1), place)
            newest = logits[-1].argmax(-1)
            outputs = step(input_ids=newest, past_key_values=cache, position_ids=positions)
            logits.append(outputs.logits)
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


def test_a_prompt_may_go_on_after_an_answer() -> None:
    """Several tokens with a cache of others rebuild all keys and values."""
    model = low_rank_(small_model("llama"))
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    tokens = torch.arange(30)[None] + 5
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=40)):
        parts = [
            prepared(input_ids=part, past_key_values=cache).logits
            for part in tokens.split([7, 1, 12, 10], dim=1)
        ]
        whole = model(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


def test_the_checkpoint_stays_the_same(tmp_path: Path) -> None:
    model = low_rank_(small_model("llama"))
    from iosvd.layers.checkpoint import mark_compressed_

    mark_compressed_(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    iosvd.save(prepared, tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved").state_dict()
    assert loaded.keys() == before.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


def test_nothing_is_kept_twice_when_a_prepared_model_moves() -> None:
    model = iosvd.prepare_for_generation(low_rank_(small_model("llama")), "latent", "latent")
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        block = moved.get_submodule("model.layers.0")
        assert isinstance(block.mlp, PackedMLP)
        for layers in (
            (block.mlp.gate_proj, block.mlp.up_proj),
            (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
        ):
            assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    # Weights that are loaded into a copy are the ones it computes with.
    other = copy.deepcopy(model)
    other.load_state_dict({n: t + 0.1 for n, t in model.state_dict().items()})
    plain = low_rank_(small_model("llama"))
    plain.load_state_dict(other.state_dict())
    assert_same(plain, other)


def test_half_precision_stays_near() -> None:
    model = low_rank_(small_model("llama")).to(torch.bfloat16)
    model.model.rotary_emb.float()
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    tokens = torch.arange(24)[None] + 5
    cache = DynamicCache()
    steps = [
        prepared(input_ids=t, past_key_values=cache).logits for t in tokens.split([20, 1, 1, 2], 1)
    ]
    plain = model(input_ids=tokens, use_cache=False).logits.double()
    exact = model.double()(input_ids=tokens, use_cache=False).logits
    off, expected = (float((each - exact).norm()) for each in (torch.cat(steps, dim=1), plain))
    assert off < 1.5 * expected


def refused(kind: str, message: str, *caches: str, **options: Any) -> None:
    """Assert that a model is refused, and left as it was."""
    model = low_rank_(small_model(kind, **options))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=message):
        iosvd.prepare_for_generation(model, *caches)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gpt2", "has q_proj, k_proj, v_proj and o_proj"),
        ("gemma2", r"caps its scores \(attn_logit_softcapping\)"),
        ("olmo2", "normalises with q_norm over more than a head"),
        ("doge", "beside its projections"),
        ("smollm3", "computes more than its projections and rotary embeddings say"),
        ("stablelm", "cannot be prepared for generation"),
        ("gpt_oss", "has sinks beside its projections"),
    ],
)
def test_other_attention_is_refused(kind: str, message: str) -> None:
    refused(kind, message)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_angles_that_change_with_the_length_are_refused(rope: str) -> None:
    scaled: dict[str, Any] = {
        "rope_type": rope,
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
    }
    if rope == "longrope":
        scaled |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    refused(
        "llama",
        "rotary embeddings depend on more",
        "full",
        "latent",
        rope_parameters=scaled,
        head_dim=16,
    )


def test_models_that_cannot_be_prepared_are_named() -> None:
    dense = small_model("llama")
    with pytest.raises(ModelError, match="the model is dense; compress it first"):
        iosvd.prepare_for_generation(dense)
    model = iosvd.prepare_for_generation(low_rank_(dense))
    with pytest.raises(ModelError, match="prepared for generation already"):
        iosvd.prepare_for_generation(model)
    model = low_rank_(small_model("llama"))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        iosvd.prepare_for_generation(model)


def test_positions_with_holes_are_refused_with_latent_keys() -> None:
    model = iosvd.prepare_for_generation(low_rank_(small_model("llama")), "latent", "latent")
    tokens = torch.arange(8)[None] + 5
    holes = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1]])
    with pytest.raises(ModelError, match="pad on the left"):
        model.generate(tokens, attention_mask=holes, max_new_tokens=2, pad_token_id=0)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    for call in (
        lambda: model(input_ids=tokens, position_ids=packed),
        lambda: model(tokens, None, packed),
        lambda: model.model(input_ids=tokens, position_ids=packed),
    ):
        with pytest.raises(ModelError, match="positions do not count"):
            call()


@pytest.mark.parametrize("padding", [0, 3])
def test_a_second_turn_may_not_be_padded_with_latent_keys(padding: int) -> None:
    """Its padding would lie between the turns, where an index is no position."""
    model = low_rank_(small_model("llama"))
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    tokens = torch.arange(20).view(2, 10) + 5
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :2] = 0  # Of the first turn, which is allowed.
    mask[1, 6 : 6 + padding] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)

    def turns(each: PreTrainedModel) -> Tensor:
        cache = DynamicCache()
        for part in (slice(0, 6), slice(6, 10)):
            logits = each(
                input_ids=tokens[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=cache,
            ).logits
        return logits

    if padding:
        with pytest.raises(ModelError, match="left of the first prompt alone"):
            turns(prepared)
    else:
        torch.testing.assert_close(turns(prepared), turns(model), atol=1e-4, rtol=0)


def test_what_a_prepared_model_cannot_do_is_refused() -> None:
    model = iosvd.prepare_for_generation(low_rank_(small_model("llama")), "latent")
    tokens = torch.arange(8)[None] + 5
    with pytest.raises(ModelError, match="returns no attentions"):
        model(input_ids=tokens, output_attentions=True)
    model.requires_grad_(True)
    with pytest.raises(ModelError, match="cannot be trained"):
        model(input_ids=tokens)
    for caches in ({"v_cache": True}, {"k_cache": "half"}):
        with pytest.raises(ConfigError, match="is neither full nor latent"):
            iosvd.prepare_for_generation(low_rank_(small_model("llama")), **caches)


def test_large_scores_stay_finite_in_float16() -> None:
    """Qwen2's key biases are large enough that only scaled scores fit into 16 bits."""
    model = low_rank_(small_model("qwen2"))
    for block in model.model.layers:
        for name in ("q_proj", "k_proj"):
            block.self_attn.get_submodule(name).bias.data.fill_(70)
    model = model.half()
    model.model.rotary_emb.float()
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent")
    cache = DynamicCache()
    for token in (torch.arange(6)[None] + 5, torch.tensor([[9]])):
        logits = prepared(input_ids=token, past_key_values=cache).logits
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 4, "cache_implementation": "static", "disable_compile": True},
    ],
    ids=["lookup", "chunks", "static chunks"],
)
def test_other_ways_of_decoding_give_the_same(attention: str, options: dict[str, Any]) -> None:
    model = low_rank_(small_model("llama"))
    model.set_attn_implementation(attention)
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    tokens = (torch.arange(12) % 5 + 5)[None]
    found = [
        each.generate(tokens, max_new_tokens=24, do_sample=False, pad_token_id=0, **options)
        for each in (model, prepared)
    ]
    assert torch.equal(found[0], found[1])


def test_a_refused_model_trains_as_before() -> None:
    model = low_rank_(small_model("smollm3")).train()
    with pytest.raises(ModelError, match="computes more than"):
        iosvd.prepare_for_generation(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    layers = compressed_layers(model).values()
    assert all(layer.weight.grad is not None for layer in layers)
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert len(storages) == len(layers)


def test_a_cache_that_does_not_fit_is_named_before_it_is_filled() -> None:
    model = iosvd.prepare_for_generation(low_rank_(small_model("llama")), "latent", "latent")
    check_fits(model, batch=8, tokens=256)
    with pytest.raises(ModelError, match=r"cache of 1024 × 1000000000 tokens.*GiB too few"):
        check_fits(model, batch=1024, tokens=10**9)


def test_in_float64_only_the_angles_are_rounded() -> None:
    """Transformers computes them in float32; a row with padding has others than its indices say."""
    model = low_rank_(small_model("llama")).double()
    prepared = iosvd.prepare_for_generation(copy.deepcopy(model), "latent", "latent")
    tokens, mask = prompts(model).values()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, found = DynamicCache(), []
    for part in (slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 12)):
        given = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        found.append(prepared(input_ids=tokens[:, part], past_key_values=cache, **given).logits)
    expected = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    difference = (torch.cat(found, dim=1) - expected).abs() * mask[..., None]
    assert difference.max() < 1e-5
    assert difference[0].max() < 1e-12  # The first row has no padding.
