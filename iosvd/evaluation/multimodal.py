"""lm-eval's tasks with images, for instance mmmu_val_art: answers are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from iosvd.errors import DataError, extra
from iosvd.system.progress import counted

if TYPE_CHECKING:  # Both take seconds to import.
    from lm_eval.api.task import Task
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from transformers import PreTrainedModel, ProcessorMixin


def seeing_lm(model: PreTrainedModel, processor: ProcessorMixin, batch_size: int) -> HFMultimodalLM:
    """Return lm-eval's form of a loaded vision-language model; it reports how far it is.

    Args:
        model: that sees.
        processor: of its text and images.
        batch_size: items per call of `generate`.
    """
    with extra("lm_eval"):
        from lm_eval.models.hf_vlms import HFMultimodalLM as Base

    class Seeing(Base):  # type: ignore[misc]  # lm-eval is not typed.
        def _create_tokenizer(self, *given: Any, **options: Any) -> None:
            # lm-eval loads it by the model's name, which a model in memory need not have.
            self.processor, self.tokenizer = processor, processor.tokenizer

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            with counted(len(requests), "zero-shot", "answer") as self.progress:
                found: list[str] = super().generate_until(requests, disable_tqdm)
                return found

        def tok_batch_multimodal_encode(self, *given: Any, **options: Any) -> Any:
            room = options.pop("left_truncate_len", None)
            found = super().tok_batch_multimodal_encode(*given, **options)
            if room is not None and (tokens := found["input_ids"].shape[1]) > room:
                # lm-eval would cut it from the left, where the images are.
                raise DataError(
                    f"a question with its images has {tokens} tokens, and the context leaves"
                    f" {room} beside the answer; leave its task out of eval.zero_shot.tasks"
                )
            return found

        def _model_multimodal_generate(self, inputs: Any, *rest: Any, **options: Any) -> Any:
            found = super()._model_multimodal_generate(inputs, *rest, **options)
            self.progress.advance(len(found))
            return found

    return Seeing(pretrained=model, batch_size=batch_size)  # type: ignore[no-any-return]


def check_room(tasks: Sequence[Task], lm: HFMultimodalLM) -> None:
    """Raise DataError if the answers of a task do not fit the model's context."""
    for task in tasks:
        answer = (task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks)
        if answer >= lm.max_length:
            raise DataError(
                f"{task.config.task} generates answers of up to {answer} tokens, which do not fit"
                f" the model's context of {lm.max_length}; leave it out of eval.zero_shot.tasks"
            )
