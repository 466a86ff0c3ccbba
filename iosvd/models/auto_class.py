"""Choose transformers' class for a model: a language model, or one that sees images too."""

from __future__ import annotations

from typing import Any

LANGUAGE = "AutoModelForCausalLM"
VISION_LANGUAGE = "AutoModelForImageTextToText"


def auto_class_of(config: Any) -> str:
    """Return the name of the auto class that loads a model of this configuration.

    Where both know it, the architecture that saved the checkpoint decides. Unknown configurations
    (code from the hub) are language models.
    """
    from transformers.models.auto import modeling_auto as auto

    kind = getattr(config, "model_type", "")
    seeing = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    if seeing is None:
        return LANGUAGE
    saved_by = (getattr(config, "architectures", None) or [seeing])[0]
    names = (seeing,) if isinstance(seeing, str) else seeing
    alone = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and saved_by not in names
    return LANGUAGE if alone else VISION_LANGUAGE
