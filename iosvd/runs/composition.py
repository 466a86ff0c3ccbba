"""Compose Hydra's configuration, and say in one line what is wrong with it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iosvd.errors import ConfigError, one_line
from iosvd.options import own_error
from iosvd.presets import conf_folder


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of these overrides, Hydra's own node included.

    Raises:
        ConfigError: one line that names the option and what it may be.
    """
    try:
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return hydra.compose("config", list(overrides), return_hydra_config=True)
    except HydraException as error:
        raise ConfigError(explained(error, overrides)) from None
    # Hydra has plain ValueErrors too, for instance for a group set to null.
    except (OmegaConfBaseException, ValueError) as error:
        raise own_error(error) or ConfigError(one_line(error)) from None


def explained(error: HydraException, overrides: Sequence[str]) -> str:
    """Say which option was meant, and what its neighbours are called."""
    ambiguous = re.match(r"Ambiguous value for argument '(.*?=.*)'", str(error))
    if isinstance(error, OverrideParseException) or ambiguous:
        given = ambiguous[1] if ambiguous else str(error.override)  # type: ignore[attr-defined]
        key, _, value = given.partition("=")
        reason = one_line(error).partition(" See https")[0].partition(" 1. ")[0]
        quoted = shlex.quote(f'{key}="{value}"')
        return (
            f"{given}: {reason}; if the value is one text, quote it for Hydra, and all for the"
            f" shell: {quoted}"
        )
    match = re.search(r"Could not override '([^']+)'", str(error))
    if match is None:
        return one_line(error).partition(" Config search path:")[0]
    parent, _, name = match[1].rpartition(".")
    groups = [o for o in overrides if "." not in o.split("=")[0] and not o.startswith(name + "=")]
    composed = compose(groups)
    siblings = OmegaConf.select(composed, parent) if parent else None
    if parent and _is_null(composed, parent):
        given = f"{parent}={{{name}: VALUE}}"
        return f"unknown option {match[1]}: {parent} is null; give it as a whole: '{given}'"
    where = f"options of {parent}" if isinstance(siblings, DictConfig) else "options"
    known = siblings if isinstance(siblings, DictConfig) else compose([])
    listed = ", ".join(str(k) for k in known if k not in ("hydra", "_target_")) or "none"
    return f"unknown option {match[1]}; {where}: {listed}"


def _is_null(composed: DictConfig, key: str) -> bool:
    """Whether an option is there and null."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(composed, parent) if parent else composed
    return isinstance(node, DictConfig) and name in node and node[name] is None
