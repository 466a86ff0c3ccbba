"""Train the embedded model on the embedded text: `make tiny-model` (half an hour of one core).

The result, with the settings and the end of the loss curve in `training.json`, is written to
`iosvd/assets/tiny`. The same machine and Python give the same weights.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from iosvd.data.pydoc import pydoc_documents
from iosvd.system.commands import arguments

TARGET = Path(__file__).parents[1] / "iosvd" / "assets" / "tiny"
POINT_STEPS = 100  # Between two points of the loss curve.


@dataclass(frozen=True)
class Schedule:
    """Options of the optimiser, and its learning rate over the steps."""

    steps: int = 1500
    warmup_steps: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_norm: float = 1.0


@dataclass(frozen=True)
class Recipe(Schedule):
    """Everything the weights depend on, besides the text and the versions."""

    vocabulary: int = 1024
    width: int = 192
    layers: int = 6
    heads: int = 6
    key_value_heads: int = 2
    mlp_width: int = 512
    context: int = 256
    batch: int = 16
    seed: int = 0
    threads: int = 1


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pydoc_documents("train"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=recipe.context,
    )


def build(recipe: Recipe) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, recipe: Schedule) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats; bf16 products, float32 weights."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=windows, labels=windows).loss


def tokens_of(split: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return one split of the text as tokens."""
    text = "\n\n".join(pydoc_documents(split))
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def optimizer_of(model: torch.nn.Module, recipe: Schedule) -> torch.optim.Optimizer:
    """Return AdamW, whose decay spares the norms."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )


def fit(
    model: torch.nn.Module,
    recipe: Schedule,
    loss_at: Callable[[int], torch.Tensor],
    measured: Callable[[], dict[str, float]],
) -> list[dict[str, float]]:
    """Train in place; return the curve, the training loss as the mean since the last point.

    Args:
        model: in training mode.
        recipe: of the optimiser.
        loss_at: the loss of a step's batch.
        measured: what a point of the curve holds beside the training loss.
    """
    optimizer = optimizer_of(model, recipe)
    curve, recent = [], []
    for step in tqdm(range(recipe.steps), unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % POINT_STEPS == 0:
            training = round(sum(recent) / len(recent), 4)
            recent.clear()
            with torch.no_grad():
                curve.append({"step": step + 1, "train": training, **measured()})
            tqdm.write(json.dumps(curve[-1]))
    return curve


def write_record(
    folder: Path,
    recipe: Schedule,
    model: PreTrainedModel,
    curve: list[dict[str, float]],
    **more: float,
) -> None:
    """Write training.json: everything about a training that the weights do not say."""
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        **more,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "curve": curve,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def train(recipe: Recipe) -> None:
    """Train tokenizer and model, and write the folder."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    tokenizer = train_tokenizer(recipe)
    text, held_out = (tokens_of(split, tokenizer) for split in ("train", "validation"))
    windows = len(held_out) // recipe.context
    held_out = held_out[: windows * recipe.context].view(windows, -1)
    model = build(recipe)

    def loss_at(_: int) -> torch.Tensor:
        starts = torch.randint(len(text) - recipe.context, (recipe.batch,))
        return loss_of(model, torch.stack([text[s : s + recipe.context] for s in starts]))

    def measured() -> dict[str, float]:
        return {"validation": round(loss_of(model, held_out).item(), 4)}

    curve = fit(model, recipe, loss_at, measured)
    model.bfloat16().save_pretrained(TARGET)
    tokenizer.save_pretrained(TARGET)
    write_record(
        TARGET,
        recipe,
        model,
        curve,
        training_tokens=recipe.steps * recipe.batch * recipe.context,
        text_tokens=len(text),
        seconds=round(time.monotonic() - started),
    )


if __name__ == "__main__":
    arguments(__doc__)
    train(Recipe())
