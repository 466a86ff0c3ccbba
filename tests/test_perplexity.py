"""Token perplexity against an independent loop, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import build, shared

from iosvd.data.texts import Dataset
from iosvd.data.windows import evaluation_windows
from iosvd.errors import NumericalError
from iosvd.evaluation.perplexity import perplexity
from iosvd.models.loading import Dtype, Model, load_model, load_tokenizer


def test_agrees_with_a_plain_loop_over_wikitext_and_ignores_the_batch_size(tmp_path: Path) -> None:
    model = Model("stories", path=str(shared("models", "stories260K")), dtype=Dtype.float32)
    whole = shared("data", "text", "wikitext2") / "test.txt"
    lines = whole.read_text().splitlines()[:300]
    (tmp_path / "test.txt").write_text("\n".join(lines) + "\n")
    tokenizer, loaded = load_tokenizer(model), load_model(model)
    dataset = Dataset("wikitext2", path=str(tmp_path), keep_line_ends=True)
    windows = evaluation_windows(tokenizer, dataset, 512)

    text = "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 511, 512):
            window = torch.tensor(ids[start : start + 512])
            p = loaded(input_ids=window[None]).logits[0].log_softmax(-1)
            total -= float(p[range(511), window[1:]].sum())
            count += 511
    assert count == len(windows) * 511 and len(windows) > 80
    expected = math.exp(total / count)

    assert perplexity(loaded, windows, batch_size=16) == pytest.approx(expected, rel=1e-5)
    some = windows[:12]
    alone = perplexity(loaded, some, batch_size=1)
    for batch_size in (5, 12):
        assert perplexity(loaded, some, batch_size) == pytest.approx(alone, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = build("llama")
    model.lm_head.weight.data.zero_()
    windows = torch.randint(0, 31, (3, 9))
    assert perplexity(model, windows) == pytest.approx(31)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_an_error(value: float) -> None:
    model = build("llama")
    model.lm_head.weight.data[3] = value
    with pytest.raises(NumericalError, match="windows 0 to 1 is NaN or infinite"):
        perplexity(model, torch.randint(0, 31, (4, 9)), batch_size=2)


def test_a_loss_beyond_any_perplexity_is_an_error() -> None:
    model = build("llama")
    model.lm_head.weight.data *= 1e6
    with pytest.raises(NumericalError, match="no finite perplexity"):
        perplexity(model, torch.randint(0, 31, (4, 9)))
