"""Notes requests to stop a training."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class PreemptionListener:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.is_requested = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Note SIGTERM, SIGUSR1 and Ctrl-C instead of ending at once; only the main thread can."""
        try:
            before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        except ValueError:  # not the main thread: whoever owns that one decides
            before = {}
        hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    def _unraisable(self, error: sys.UnraisableHookArgs) -> None:
        """Raise a Ctrl-C again that arrived in a finalizer, where Python prints it and goes on."""
        if self.is_requested and error.exc_type is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        else:
            sys.__unraisablehook__(error)

    def _note(self, number: int, frame: object) -> None:
        if self.is_requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # who presses twice does not want to wait
        self.is_requested = True
