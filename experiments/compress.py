"""Compress, evaluate and record: one run, or with -m a sweep.

    python experiments/compress.py method=io_svd ratio=0.6
    python experiments/compress.py -m experiment=demo
    python experiments/compress.py -m experiment=main launcher=joblib

Every run of a sweep is composed and checked before the first one starts; the dense model, which
its rows are compared with, is measured first. A run that is complete is skipped, one that fails
stops no other; the exit status is 1 if any is missing at the end, 2 if the command itself is wrong.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

if __name__ == "__main__":  # The imports below take seconds; Ctrl-C in them is no traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import hydra

from iosvd.errors import IosvdError, one_line
from iosvd.runs.config import CONF, compose_run
from iosvd.runs.records import run_folder
from iosvd.runs.steps import cache_of
from iosvd.runs.tracking import check_tracking
from iosvd.sweeps.expansion import sweep_jobs
from iosvd.sweeps.hydra_internals import command_line
from iosvd.sweeps.launching import carry_out, carry_out_one
from iosvd.sweeps.status import State, standing
from iosvd.system.interrupts import interruptible
from iosvd.system.logs import log_to_console

log = logging.getLogger("iosvd.compress")


def main() -> int:
    """Check everything, run everything, and say what is missing."""
    arguments = command_line()
    if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info:
        _hydra()
        return 0
    log_to_console()
    try:
        jobs = sweep_jobs(arguments.overrides) if arguments.multirun else []
        run = jobs[0].run if jobs else compose_run(arguments.overrides)
        run_folder(run)  # Finds what is missing on disk before anything starts.
        cache_of(run).check()
        check_tracking(run.wandb)
    except (IosvdError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if not arguments.multirun:
        _hydra()
        return 0 if standing(run).state is State.done else 1
    ended = carry_out(jobs, arguments.overrides)
    missing = [found for found in ended if found.state is not State.done]
    for found in missing:
        log.error("%s: %s %s", found.folder.name, found.state.value, found.reason)
    if missing:
        log.error("%d of %d runs failed", len(missing), len(ended))
    return 1 if missing else 0


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _hydra(composed: object) -> None:
    carry_out_one(composed)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(interruptible(main))
