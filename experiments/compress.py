"""Compress, evaluate and record: one run, or with -m a sweep.

    python experiments/compress.py method=io_svd ratio=0.6
    python experiments/compress.py -m experiment=demo
    python experiments/compress.py -m experiment=main launcher=joblib

All runs of a sweep are composed and checked before the first one starts; the dense model, the
baseline of its rows, is measured first. Complete runs are skipped, and a failing run stops no
other. The exit status is 1 if any run is missing at the end, 2 if the command itself is wrong.
"""

from __future__ import annotations

import logging
import signal
import sys

if __name__ == "__main__" and hasattr(signal, "pthread_sigmask"):
    # Blocked until `interruptible` waits for it: the imports take seconds, and their threads must
    # not receive Ctrl-C either.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import hydra

from iosvd.errors import IosvdError, one_line
from iosvd.presets import conf_folder
from iosvd.runs.config import compose_run
from iosvd.runs.records import run_folder
from iosvd.runs.steps import cache_of
from iosvd.runs.tracking import check_tracking
from iosvd.sweeps.expansion import sweep_jobs
from iosvd.sweeps.hydra_internals import command_line
from iosvd.sweeps.launching import carry_out, carry_out_one
from iosvd.sweeps.status import Stamps, State
from iosvd.system.commands import arguments
from iosvd.system.interrupts import interruptible
from iosvd.system.logs import log_to_console

log = logging.getLogger("iosvd.compress")


def main() -> int:
    """Check and carry out all runs, and report those that are missing at the end."""
    arguments(None)
    command = command_line()
    if command.help or command.hydra_help or command.cfg or command.info:
        _hydra()
        return 0
    log_to_console()
    try:
        jobs = sweep_jobs(command.overrides) if command.multirun else []
        run = jobs[0].run if jobs else compose_run(command.overrides)
        run_folder(run)  # Finds missing files before anything starts.
        cache_of(run).check()
        check_tracking(run.runtime.tracking)
    except (IosvdError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if not command.multirun:
        before = Stamps.of([run])
        _hydra()
        return 0 if before.status_of(run).state is State.done else 1
    try:
        ended = carry_out(jobs, command.overrides)
    except (IosvdError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    missing = [found for found in ended if found.state is not State.done]
    for found in missing:
        log.error("%s: %s %s", found.folder.name, found.state.value, found.reason)
    if missing:
        log.error("%d of %d runs failed", len(missing), len(ended))
    return 1 if missing else 0


@hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")
def _hydra(composed: object) -> None:
    carry_out_one(composed)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(interruptible(main))
