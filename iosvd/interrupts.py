"""Ctrl-C and SIGTERM end a command in one line, whatever it is at, and its workers with it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

_LINE = "interrupted; the same command goes on where this one ended\n"


def interruptible(main: Callable[[], int]) -> int:
    """Carry out a command and return its status: 128 and the signal's number, if one ended it."""
    signal.signal(signal.SIGINT, _raise)
    signal.signal(signal.SIGTERM, _raise)
    if hasattr(signal, "pthread_sigmask"):
        # Workers inherit the mask: a terminal sends them Ctrl-C too, but they end with us.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        threading.Thread(target=_await_interrupt, daemon=True).start()
    try:
        return main()
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(_LINE)
        return 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)


def _raise(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _await_interrupt() -> None:
    signal.sigwait([signal.SIGINT])
    _thread.interrupt_main()
    signal.sigwait([signal.SIGINT])  # Whoever asks twice does not want to wait.
    _end(signal.SIGINT, None)


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, _LINE.encode())
    os._exit(128 + number)
