"""Named methods: the presets of conf/method, composed without Hydra for use from Python.

The commands in experiments/ compose the same files by Hydra; a test checks that both agree.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iosvd.errors import ConfigError, one_line
from iosvd.factorization import Factorization
from iosvd.method import Method
from iosvd.options import number, typed_group, variant

GROUPS = ("whitening", "allocation", "correction", "quantization")
_PACKAGE = Path(__file__).parent


def conf_folder() -> Path:
    """Return the folder of YAML files, which an installed package holds itself."""
    inside = _PACKAGE / "conf"  # In a checkout a link, which some systems cannot make.
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml"))


def preset(name: str, ratio: float | None = None, target_kl: float | None = None) -> Method:
    """Return the method of a preset.

    Args:
        name: of a file in conf/method.
        ratio: the maintenance ratio, which some options follow; the floor of zs_svd, for instance.
        target_kl: given instead of a ratio.

    Raises:
        ConfigError: there is no such preset, or it needs a ratio.
    """
    if name not in (names := preset_names()):
        near = get_close_matches(name, names, n=3) or names
        raise ConfigError(f"no method is called {name}; did you mean {', '.join(near)}?")
    options = _default_options()
    body = _collect("method", name, options)
    if ratio is None and target_kl is None and "${ratio}" in str(OmegaConf.to_container(body)):
        raise ConfigError(f"the options of {name} follow the ratio; give preset() the ratio too")
    groups = {group: _collect(group, option, {}) for group, option in options.items()}
    defaults = {"factorization": {}, "min_rank_fraction": 0.0}
    composed = OmegaConf.merge(defaults, groups, body, {"ratio": ratio})
    assert isinstance(composed, DictConfig)
    try:
        OmegaConf.resolve(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"conf/method/{name}.yaml: {one_line(error)}") from None
    return method_of(composed)


def method_of(composed: DictConfig) -> Method:
    """Return the method of a composed configuration, whose interpolations are resolved.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of range.
    """
    return Method(
        whitening=variant(composed, "whitening"),
        allocation=variant(composed, "allocation"),
        correction=variant(composed, "correction"),
        quantization=variant(composed, "quantization"),
        factorization=typed_group(Factorization, composed, "factorization"),
        min_rank_fraction=number(composed.min_rank_fraction, "min_rank_fraction"),
    )


def _default_options() -> dict[str, str]:
    """Return the options that conf/config.yaml chooses where a preset chooses none."""
    entries = _load("", "config")["defaults"]
    chosen = {k: v for entry in entries if isinstance(entry, dict) for k, v in entry.items()}
    return {group: chosen[group] for group in GROUPS}


def _collect(group: str, name: str, options: dict[str, str]) -> DictConfig:
    """Return a file's values, over those of its bases; add the options that a preset chooses."""
    loaded = _load(group, name)
    body = OmegaConf.create({})
    entries = loaded.pop("defaults", [])
    for base in (entry for entry in entries if isinstance(entry, str) and entry != "_self_"):
        body = OmegaConf.merge(body, _collect(group, base, options))  # type: ignore[assignment]
    for entry in (entry for entry in entries if isinstance(entry, dict)):
        options |= {key.removeprefix("override /"): option for key, option in entry.items()}
    merged = OmegaConf.merge(body, loaded)
    assert isinstance(merged, DictConfig)
    return merged


def _load(group: str, option: str) -> dict[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(conf_folder() / group / f"{option}.yaml"))
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items()}
