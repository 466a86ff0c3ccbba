"""Low-rank compression of large language models: IO-SVD and the methods it is compared with.

After `import iosvd`, transformers loads and saves compressed checkpoints. The hook for that is
installed when transformers' quantizers are imported, which takes seconds that tables do not need.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

from iosvd.cache.spectra import Factorized
from iosvd.data.texts import Dataset, Split
from iosvd.data.windows import calibration_windows, evaluation_windows
from iosvd.errors import IosvdError
from iosvd.evaluation.perplexity import perplexity
from iosvd.evaluation.zero_shot import ZeroShot, load_tasks, zero_shot
from iosvd.method import Method
from iosvd.models.loading import Model, load_model, load_tokenizer
from iosvd.pipeline import Compressed, compress, factorize

if TYPE_CHECKING:
    from iosvd.inference.prepare import prepare_for_generation
    from iosvd.layers.checkpoint import export_dense, save
    from iosvd.presets import preset, preset_names

__all__ = [
    "Compressed",
    "Dataset",
    "Factorized",
    "IosvdError",
    "Method",
    "Model",
    "Split",
    "ZeroShot",
    "calibration_windows",
    "compress",
    "evaluation_windows",
    "export_dense",
    "factorize",
    "load_model",
    "load_tasks",
    "load_tokenizer",
    "perplexity",
    "prepare_for_generation",
    "preset",
    "preset_names",
    "save",
    "zero_shot",
]


@when_imported("transformers.quantizers.auto")
def _teach_transformers(_: ModuleType) -> None:
    import_module("iosvd.layers.checkpoint")


# Imported when they are used: checkpoints import much of transformers, presets OmegaConf.
_LAZY = {
    "export_dense": "iosvd.layers.checkpoint",
    "prepare_for_generation": "iosvd.inference.prepare",
    "preset": "iosvd.presets",
    "preset_names": "iosvd.presets",
    "save": "iosvd.layers.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
