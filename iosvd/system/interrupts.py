"""Ctrl-C and SIGTERM end a command in one line, whatever it is at, and its workers with it."""

from __future__ import annotations

import _thread
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

_LOOK_SECONDS = 1.0
_WAITING = "awaits Ctrl-C"
_asked: list[int] = []  # The signals that asked for the end.
_LINE = "interrupted; the same command goes on where this one ended\n"


def interruptible(main: Callable[[], int]) -> int:
    """Carry out a command and return its status: 128 and the signal's number, if one ended it."""
    signal.signal(signal.SIGINT, _raise)
    signal.signal(signal.SIGTERM, _raise)
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            # Ctrl-C may be pending already: from here on it can come at any moment.
            threading.Thread(target=_await_interrupt, daemon=True, name=_WAITING).start()
        status = main()
        raise_if_asked()
        return status
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(_LINE)
        return 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)


def raise_if_asked() -> None:
    """Raise KeyboardInterrupt where a library has swallowed the one that a signal raised."""
    if _asked:
        raise KeyboardInterrupt(_asked[0])


def shield_workers() -> None:
    """Keep Ctrl-C from workers that are started from now on: they end with this process.

    A terminal sends it to all of them, and each would print where it was. They inherit the
    signals that this thread blocks; the trackers of resources, Python's and joblib's, unblock
    them where they are started, so they are started before.
    """
    if not any(thread.name == _WAITING for thread in threading.enumerate()):
        return  # Nobody would notice Ctrl-C.
    from multiprocessing import resource_tracker

    from joblib.externals.loky.backend import resource_tracker as joblib_tracker

    resource_tracker.ensure_running()
    joblib_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def _raise(number: int, _: FrameType | None) -> None:
    if _asked:
        _end(number, None)  # Whoever asks twice does not want to wait.
    _asked.append(number)
    raise KeyboardInterrupt(number)


def _await_interrupt() -> None:
    signal.sigwait([signal.SIGINT])
    _thread.interrupt_main()
    signal.sigwait([signal.SIGINT])  # Whoever asks twice does not want to wait.
    _end(signal.SIGINT, None)


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, _LINE.encode())
    os._exit(128 + number)


@functools.cache
def end_with(launcher: int) -> None:
    """End this process as soon as the launcher, whose child it is, has ended, however that was.

    joblib's workers would otherwise wait for its next job for ever, with their GPUs.
    """

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)  # Not sys.exit: the main thread is computing.

    threading.Thread(target=watch, daemon=True).start()
