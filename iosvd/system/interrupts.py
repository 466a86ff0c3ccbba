"""Ctrl-C and SIGTERM end a command and its workers at any moment, with one line."""

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
_asked: list[int] = []  # The signals received.
_LINE = "interrupted; run the same command again to resume\n"


def interruptible(main: Callable[[], int]) -> int:
    """Run a command and return its status: 128 plus the signal's number if a signal ended it."""
    signal.signal(signal.SIGINT, _raise)
    signal.signal(signal.SIGTERM, _raise)
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            # Ctrl-C may be pending already; from here on it can arrive at any moment.
            threading.Thread(target=_await_interrupt, daemon=True, name=_WAITING).start()
        status = main()
        raise_if_asked()
        return status
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(_LINE)
        return 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)


def raise_if_asked() -> None:
    """Raise KeyboardInterrupt if a library has swallowed the one that a signal raised."""
    if _asked:
        raise KeyboardInterrupt(_asked[0])


def shield_workers() -> None:
    """Shield workers that are started from now on from Ctrl-C; they end with this process.

    A terminal sends Ctrl-C to all processes, and each would print a traceback. Workers inherit the
    signals that this thread blocks. The resource trackers of Python and joblib unblock them when
    they start, so they are started first.
    """
    if not any(thread.name == _WAITING for thread in threading.enumerate()):
        return  # No thread waits for Ctrl-C, so it must not be blocked.
    from multiprocessing import resource_tracker

    from joblib.externals.loky.backend import resource_tracker as joblib_tracker

    resource_tracker.ensure_running()
    joblib_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def _raise(number: int, _: FrameType | None) -> None:
    if _asked:
        _end(number, None)  # A second Ctrl-C means: at once.
    _asked.append(number)
    raise KeyboardInterrupt(number)


def _await_interrupt() -> None:
    signal.sigwait([signal.SIGINT])
    _thread.interrupt_main()
    signal.sigwait([signal.SIGINT])  # A second Ctrl-C means: at once.
    _end(signal.SIGINT, None)


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, _LINE.encode())
    os._exit(128 + number)


@functools.cache
def end_with(launcher: int) -> None:
    """End this process as soon as its parent, the launcher, has ended in any way.

    Otherwise joblib's workers would wait for jobs for ever and hold their GPUs.
    """

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)  # Not sys.exit: the main thread is computing.

    threading.Thread(target=watch, daemon=True).start()
