"""A model's processor where there is no torchvision.

Some processors (Qwen2-VL's, InternVL's) have a part for videos, which wants torchvision. Questions
about images need neither, so the part can be left out; its settings are kept for who has both.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin

_VIDEO = "video_processor"


def without_videos(config: PretrainedConfig) -> type[ProcessorMixin] | None:
    """Return a class that loads a model's processor without its part for videos.

    Args:
        config: the model's; its type names the processor.

    Returns:
        None if torchvision is installed, or the processor cannot do without the part.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils.import_utils import is_torchvision_available

    if is_torchvision_available() or type(config) not in PROCESSOR_MAPPING:
        return None
    found: Any = PROCESSOR_MAPPING[type(config)]
    return reading_class(found) if can_do_without(found) else None


def can_do_without(processor: Any) -> bool:
    """Whether a processor's part for videos is its last and optional one, for videos alone."""
    from transformers import ProcessorMixin

    if not (isinstance(processor, type) and issubclass(processor, ProcessorMixin)):
        return False  # What transformers puts in place of a class whose libraries are missing.
    optional = inspect.signature(processor).parameters.get(_VIDEO)
    own = (vars(each) for each in processor.mro()[: processor.mro().index(ProcessorMixin)])
    return (
        optional is not None
        and optional.default is None
        and processor.get_attributes()[-1] == _VIDEO
        and not any({"apply_chat_template", "save_pretrained"} & set(names) for names in own)
    )


def reading_class(processor: Any) -> type[ProcessorMixin]:
    """Return a class of the same name whose objects have no part for videos."""
    from transformers.models.auto.video_processing_auto import get_video_processor_config

    class Reading(processor):  # type: ignore[misc]
        _videos: Mapping[str, Any] = MappingProxyType({})  # The settings of the part.

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor.get_attributes() if name != _VIDEO]

        @classmethod
        def from_pretrained(cls, source: Any, **options: Any) -> Any:
            found = super().from_pretrained(source, **options)
            found._videos = get_video_processor_config(source, revision=options.get("revision"))
            return found

        def to_dict(self) -> dict[str, Any]:
            settings = {_VIDEO: dict(self._videos)} if self._videos else {}
            return {**super().to_dict(), **settings}

    Reading.__name__ = processor.__name__
    return Reading
