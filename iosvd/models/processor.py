"""The class that loads a model's processor: what turns text and images into a model's inputs.

Many processors (Qwen2-VL's, SmolVLM2's) want a part for videos, and that part wants torchvision.
Questions about images need neither, so without torchvision the part is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin

_VIDEO = "video_processor"


def processor_class(config: PretrainedConfig) -> Any:
    """Return the class whose `from_pretrained` loads the processor of a model.

    Args:
        config: the model's; its type names the processor.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils.import_utils import is_torchvision_available

    if is_torchvision_available() or type(config) not in PROCESSOR_MAPPING:
        return AutoProcessor
    found: Any = PROCESSOR_MAPPING[type(config)]
    return without_videos(found) if _VIDEO in found.get_attributes() else AutoProcessor


def without_videos(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a class of the same name and methods whose objects have no part for videos."""
    parts = [name for name in processor.get_attributes() if name != _VIDEO]
    return type(processor.__name__, (processor,), {"get_attributes": classmethod(lambda _: parts)})
