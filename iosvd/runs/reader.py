"""The tokenizer and the image processor of a run's model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from iosvd.errors import ModelError
from iosvd.models.loading import load_processor, load_tokenizer
from iosvd.runs.run import Run

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer, and the processor of images that a vision-language model has."""

    model: str  # Its name, for messages.
    tokenizer: PreTrainedTokenizerBase
    images: ProcessorMixin | None
    missing: str = ""  # Why there is no processor.

    @classmethod
    def of(cls, run: Run) -> Reader:
        """Load both; a processor that cannot be loaded is missed only where images are shown."""
        try:
            processor, missing = load_processor(run.model), ""
        except ModelError as error:
            if run.sees:
                raise
            processor, missing = None, str(error)
        return cls(run.model.name, load_tokenizer(run.model), processor, missing)

    @property
    def processor(self) -> ProcessorMixin:
        """The processor.

        Raises:
            ModelError: the model sees no images.
        """
        if self.images is None:
            raise ModelError(
                self.missing
                or f"{self.model} reads text alone, and questions about images are asked; choose a"
                " vision-language model, or another dataset and eval"
            )
        return self.images

    @property
    def saved(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        """The processor if there is one, else the tokenizer; saved beside a checkpoint."""
        return self.tokenizer if self.images is None else self.images
