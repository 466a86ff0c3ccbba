"""Compress, evaluate and record: one run, or with -m a sweep.

    python experiments/compress.py method=io_svd ratio=0.6
    python experiments/compress.py -m experiment=demo

Every run of a sweep is composed and checked before the first one starts; the dense model, which
its rows are compared with, is measured first. A run that is complete is skipped, one that fails
stops no other; the exit status is 1 if any is missing at the end, 2 if the command itself is wrong.
"""

from __future__ import annotations

import logging
import sys

import hydra
import transformers
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from iosvd.config import CONF, label, method_options, to_run
from iosvd.errors import IosvdError
from iosvd.execution import execute
from iosvd.recent import Recent
from iosvd.records import is_complete, run_folder
from iosvd.sweeps import baselines, expand
from iosvd.tracking import check_tracking

# Hydra calls `job` for one run of a sweep after the other, in this process.
RECENT = Recent()


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(composed: DictConfig) -> None:
    """Carry out one run of Hydra's."""
    hydra_config = HydraConfig.get()
    options = method_options(hydra_config.overrides.task)
    run = to_run(composed, label(hydra_config.runtime.choices.get("method"), options))
    execute(run, RECENT)


def main() -> int:
    """Check everything, run everything, and say what is missing."""
    arguments = get_args_parser().parse_args()
    if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info:
        job()
        return 0
    try:
        first = baselines(arguments.overrides) if arguments.multirun else []
        runs = first + expand(arguments.overrides, arguments.multirun)
        for run in runs:
            run_folder(run)  # Finds what is missing on disk before anything starts.
        check_tracking(runs[0].wandb)
    except IosvdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():  # Bars are for people; ours know that by themselves.
        transformers.utils.logging.disable_progress_bar()
    _log_to_console()
    for run in first:
        execute(run)
    job()
    # Not before they ran: two that are the same run share the folder of the first.
    missing = [run for run in runs if not is_complete(run_folder(run))]
    if missing:
        logging.getLogger(__name__).error("%d of %d runs failed", len(missing), len(runs))
    return 1 if missing else 0


def _log_to_console() -> None:
    """Log as Hydra's jobs will: it configures logging only when they start."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stdout,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )


if __name__ == "__main__":
    sys.exit(main())
