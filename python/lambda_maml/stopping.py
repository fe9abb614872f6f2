"""Signals that end a run at the next place where it can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SIGNALS", "Stop", "stoppable"]

SIGNALS = {
    signal.SIGINT: "interrupt", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP", signal.SIGUSR1: "SIGUSR1"
}  # fmt: skip
"""Ctrl-C; what batch systems send, Slurm SIGTERM when time is up, and SIGUSR1 before it (`--signal=USR1@120`); and
SIGHUP, when the terminal is closed."""


class Stop:
    """Whether the run is to end: `reason` is None, or the word of `SIGNALS`."""

    reason: str | None = None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Turn the signals into a `Stop` that is looked at between iterations; a second Ctrl-C interrupts at once.

    Outside of the main thread, where Python knows no signals, nothing is changed. SIGHUP stays ignored where it is, as
    under nohup; Ctrl-C does not, which shells ignore for what they start in the background.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def on_signal(number: int, frame: Any) -> None:
        stop.reason = stop.reason or SIGNALS[signal.Signals(number)]
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
