"""SIGTERM and SIGINT: the first one asks a run to stop after its step, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)
# Seconds: terminals send the same request twice within a moment, and torchrun sends on what Slurm has sent to all.
AGAIN = {signal.SIGINT: 1.0, signal.SIGTERM: 3.0}


class Interrupted(KeyboardInterrupt):
    """A run stopped where it was asked to, its state saved. code: what the process should exit with, 128 and the
    signal's number, as shells and schedulers report one: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number

    def __reduce__(self) -> Any:
        return Interrupted, (self.code - 128,)


class Asked:
    """Inside `with`, in the main thread: `number` is the signal that asked to stop, None before one came.

    A second signal, AGAIN seconds or more after the first, does what it does to any process: it ends it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Asked:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self.note) for number in STOPS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(self, number: int, frame: object = None) -> None:
        """The handler."""
        if self.number is None:
            self.number, self._first = number, time.monotonic()
        elif time.monotonic() - self._first >= AGAIN[signal.Signals(number)]:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def held() -> Iterator[None]:
    """Signals that ask to stop wait. Around the start of worker processes, which inherit that until `in_worker`:
    one that is asked in between would end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_worker(_: int = 0) -> None:
    """For processes that prepare batches: schedulers and terminals signal all processes at once, torchrun after them
    its own, and the run needs these until its step is done. SIGTERM is passed over until AGAIN seconds after the first
    one; a later one, multiprocessing's own, is obeyed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, Asked().note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
