"""Load any Hugging Face causal language model: from the hub, from a folder, or embedded."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iosvd.errors import ConfigError, IosvdError, ModelError, check_installed, one_line
from iosvd.models.attention_form import to_form_
from iosvd.models.auto_class import LANGUAGE, auto_class_of
from iosvd.models.completeness import check_complete
from iosvd.models.gguf import GgufFile, context_length, described, make_ordinary_
from iosvd.models.linear_form import to_linear_form_
from iosvd.models.processor import without_videos
from iosvd.models.sites import SiteSelection, decoder_of
from iosvd.models.visiting import visit_
from iosvd.system.files import check_no_pointers
from iosvd.system.hub_cache import unwritable_cache
from iosvd.system.json_files import read_json
from iosvd.system.machine import out_of_memory
from iosvd.system.progress import bars_for_people

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# Names of the context's length in the configurations of various architectures.
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
ADAPTER = "adapter_config.json"
ASSETS = Path(__file__).parents[1] / "assets"


class Dtype(Enum):
    """Floating-point type the model is loaded and saved in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"

    @property
    def torch(self) -> torch.dtype:
        return {
            Dtype.float16: torch.float16,
            Dtype.bfloat16: torch.bfloat16,
            Dtype.float32: torch.float32,
        }[self]


def _dtype(name: str) -> Dtype:
    names = [dtype.value for dtype in Dtype]
    if name not in names:
        raise ConfigError(f"dtype={name} is not one of {', '.join(names)}")
    return Dtype(name)


@dataclass(frozen=True)
class Model:
    """A model, its precision, and which of its layers are targets."""

    name: str
    path: str | None = None  # A local folder, which takes precedence over the hub.
    hub_id: str | None = None
    revision: str | None = None
    embedded: bool = False  # One of the models that come with the package.
    gguf_file: str | None = None  # A file in the folder or the repository, instead of all others.
    dtype: Dtype = Dtype.float16
    seq_len: int = 2048  # Default window length: the protocol's, or a shorter context's.
    trust_remote_code: bool = False
    sites: SiteSelection = field(default_factory=SiteSelection)

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str):  # From Python; the value is frozen otherwise.
            object.__setattr__(self, "dtype", _dtype(self.dtype))


def load_model(
    model: Model,
    device: str = "cpu",
    device_map: str | None = None,
    *,
    blocks_on_cpu: bool = False,
) -> PreTrainedModel:
    """Load the weights in the model's dtype, in evaluation mode.

    Args:
        device: for instance "cuda:0"; ignored with a device map.
        device_map: passed to transformers, for instance "auto" to use all GPUs.
        blocks_on_cpu: keep the decoder blocks in main memory; each visits the device to compute.

    Raises:
        ModelError: no such model, no network, or a damaged file; the text says what to set.
    """
    options: dict[str, Any] = {"dtype": model.dtype.torch, "output_loading_info": True}
    if device_map is not None:
        options["device_map"] = device_map
    _check_no_adapter(model)
    loaded, found = _load(_auto_class(model), model, options)
    loaded.eval()
    check_complete(loaded, found, str(folder_of(model) or model.hub_id))
    if model.gguf_file is not None:
        make_ordinary_(loaded)
    _read(loaded)
    if blocks_on_cpu:
        to_linear_form_(loaded)  # Before the weights are pinned.
        to_form_(loaded, decoder_of(loaded), model.sites.form)
        visit_(loaded, torch.device(device))
        return loaded
    return loaded if device_map is not None else loaded.to(device)


def _check_no_adapter(model: Model) -> None:
    """Raise ModelError if there is an adapter, which transformers loads where peft is installed."""
    from transformers.utils.peft_utils import find_adapter_config_file

    folder, found = _source_of(model), False
    if folder is not None:
        found = (folder / ADAPTER).is_file()
    else:
        with suppress(OSError):  # Loading says what is wrong.
            found = find_adapter_config_file(str(model.hub_id), revision=model.revision) is not None
    if found and (folder is None or (folder / "config.json").is_file()):
        raise ModelError(
            f"{folder or model.hub_id} holds an adapter ({ADAPTER}) beside the model; merge it"
            " first (peft: merge_and_unload, then save_pretrained), or remove it"
        )


def _read(model: PreTrainedModel) -> None:
    """Read weights that are mapped from a file: unread, they do not count as memory in use."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.detach().reshape(-1)[:: max(1, 4096 // parameter.element_size())].sum()


def _auto_class(model: Model) -> str:
    return LANGUAGE if model.gguf_file is not None else auto_class_of(load_config(model))


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer."""
    return _load("AutoTokenizer", model, {})


def load_processor(model: Model) -> ProcessorMixin | None:
    """Load what turns text and images into a model's inputs; None if the model reads only text.

    Raises:
        ModelError: a vision-language model without a processor that works here.
    """
    if _auto_class(model) == LANGUAGE:
        return None
    try:
        found = _load("AutoProcessor", model, {})
    except ModelError:
        reading = without_videos(load_config(model))
        if reading is None:
            raise
        found = _load(reading, model, {})
    if getattr(found, "image_processor", None) is None:
        raise ModelError(
            f"{folder_of(model) or model.hub_id} has no processor of images beside the model; its"
            " folder must hold preprocessor_config.json or processor_config.json"
        )
    return found


def load_config(model: Model) -> Any:
    """Load only the model's configuration."""
    return _load("AutoConfig", model, {})


def context_of(folder: str, gguf_file: str | None = None) -> int:
    """Return the context length of the model in a folder, in tokens.

    Raises:
        ModelError: neither its config.json nor its GGUF file says so.
    """
    if gguf_file is not None:
        return context_length(Path(folder) / gguf_file)
    path = Path(folder) / "config.json"
    try:
        config = read_json(path)
        both = {**config.get("text_config", {}), **config}  # Of a vision-language model.
        return int(next(both[name] for name in _CONTEXT if name in both))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a model folder: it has no config.json") from None
    except PermissionError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; ask its owner") from None
    except (OSError, ValueError, AttributeError, StopIteration, TypeError):
        raise ModelError(f"{path} does not name the model's context; set model.seq_len") from None


def folder_of(model: Model) -> Path | None:
    """Return the model's local folder, or None if it is to come from the hub."""
    if model.embedded:
        return ASSETS / model.name
    return Path(model.path) if model.path is not None else None


def gguf_of(model: Model) -> GgufFile | None:
    """Return the GGUF file of a model, None if it has none.

    Raises:
        ModelError: the file cannot be read.
    """
    if model.gguf_file is None:
        return None
    if (folder := folder_of(model)) is not None:
        return described(folder / model.gguf_file)
    return described(_hub_file(model, model.gguf_file))


def hub_revision(model: Model) -> str | None:
    """Return the hub's commit of a model, None for a local folder."""
    if folder_of(model) is not None:
        return None
    from transformers.utils.hub import extract_commit_hash

    found = _hub_file(model, model.gguf_file or "config.json")
    return extract_commit_hash(found.as_posix(), None)


def holds_model(folder: Path) -> bool:
    """Whether there is a model in a folder."""
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))


def _source_of(model: Model) -> Path | None:
    """Return the model's folder, None for the hub; raise ConfigError if it is from nowhere."""
    folder = folder_of(model)
    if folder is None and model.hub_id is None:
        raise ConfigError(f"model {model.name} has no source; set model.path=FOLDER")
    return folder


def _hub_file(model: Model, name: str) -> Path:
    """Return a file of a hub's repository in the local cache, where it is put first."""
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(str(model.hub_id), name, revision=model.revision or "main")))
    except OSError as error:
        raise _not_on_hub(model, error) from error


def _not_on_hub(model: Model, error: BaseException) -> ModelError:
    if (remedy := unwritable_cache(error)) is not None:
        return ModelError(f"cannot load {model.hub_id}: {remedy}")
    return ModelError(
        f"cannot load {model.hub_id} from the hub: {one_line(error)[:300]};"
        " to use a local copy set model.path=FOLDER"
    )


def _load(loader: Any, model: Model, options: dict[str, Any]) -> Any:
    """Call `from_pretrained` of a class, or of transformers' class of a name."""
    import transformers

    folder = _source_of(model)
    needed = model.gguf_file or "config.json"
    if folder is not None and not (folder / needed).is_file():
        if (folder / ADAPTER).is_file():
            raise ModelError(
                f"{folder} holds an adapter without its model; merge them first (peft:"
                " merge_and_unload, then save_pretrained)"
            )
        raise ModelError(f"{folder} is not a model folder: it has no {needed}; set model.path")
    options = {**options, "trust_remote_code": model.trust_remote_code}
    if model.gguf_file is not None:
        check_installed(["gguf"])
        options["gguf_file"] = model.gguf_file
    if folder is None:
        options["revision"] = model.revision or "main"
    source = folder or model.hub_id
    try:
        with nullcontext() if model.gguf_file is None else bars_for_people():
            loader = getattr(transformers, loader) if isinstance(loader, str) else loader
            return loader.from_pretrained(source, **options)
    except IosvdError:
        raise
    # transformers, safetensors and the hub client raise many types for a model they cannot load.
    except Exception as error:
        if out_of_memory(error):
            raise
        if folder is not None:
            check_no_pointers(folder)
            cause = one_line(error)[:300]
            raise ModelError(
                f"cannot load the model in {folder}: {cause}; its files may be damaged, or of"
                " another version of transformers"
            ) from error
        raise _not_on_hub(model, error) from error
