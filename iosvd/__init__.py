"""Low-rank compression of large language models: IO-SVD and the methods it is compared with.

Importing the package teaches transformers to load and save compressed checkpoints.
"""

from iosvd.checkpoint import export_dense, save
from iosvd.data import calibration_windows, evaluation_windows
from iosvd.errors import IosvdError
from iosvd.evaluation.perplexity import perplexity
from iosvd.evaluation.zero_shot import ZeroShot, load_tasks, zero_shot
from iosvd.models import Model, load_model, load_tokenizer
from iosvd.pipeline import Compressed, compress
from iosvd.texts import Dataset, Split

__all__ = [
    "Compressed",
    "Dataset",
    "IosvdError",
    "Model",
    "Split",
    "ZeroShot",
    "calibration_windows",
    "compress",
    "evaluation_windows",
    "export_dense",
    "load_model",
    "load_tasks",
    "load_tokenizer",
    "perplexity",
    "save",
    "zero_shot",
]
