"""The only file that uses Hydra's private names; a newer Hydra may need changes here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig


def command_line() -> argparse.Namespace:
    """Return the arguments of a Hydra command: -m, --cfg and the like, and the overrides."""
    return get_args_parser().parse_args()


def split_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run of a sweep.

    Raises:
        HydraException: an override cannot be read.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return BasicSweeper.split_arguments(parsed, None)[0]


@contextmanager
def launcher(
    folder: str, overrides: Sequence[str], task: Callable[[DictConfig], None]
) -> Iterator[Launcher]:
    """Yield the launcher that the overrides choose, to carry out a task for each of its jobs.

    Args:
        folder: of the configuration.
        overrides: of the sweep's command line.
        task: called with the composition of each job.
    """
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("compress", create_config_search_path(folder))
    try:
        config = hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
        yield Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=config
        )
    finally:
        GlobalHydra.instance().clear()
