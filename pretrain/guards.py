"""What keeps a training from harm: a bad loss is skipped, and a signal ends it at the end of a step."""

from __future__ import annotations

import math
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.config import Guards
from pretrain.telemetry import SKIPPED

_WINDOW = 200  # steps whose losses say what is usual
_FEWEST = 50
_LASTING = 5  # high losses in a row that are no spike: the level has changed
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def highest_loss(rows: Sequence[Mapping[str, float]], guards: Guards) -> float:
    """The loss above which the next step is skipped, from the steps so far."""
    usual = [row["loss"] for row in rows[-_WINDOW:] if SKIPPED not in row]
    high = skipped_in_a_row(rows)
    lasting = high >= _LASTING and all("loss" in row for row in rows[-high:])
    if guards.loss_spike_threshold is None or len(usual) < _FEWEST or lasting:
        return math.inf
    middle = statistics.median(usual)
    deviation = statistics.fmean(abs(loss - middle) for loss in usual)
    return middle + guards.loss_spike_threshold * max(deviation, 1e-3 * abs(middle))


def poison(loss: Tensor, highest: float) -> Tensor:
    """1 for a usual loss, NaN for another: a factor that makes every rank's gradient NaN, and so the step skipped.

    It stays on the device, so that the backward pass does not wait for the loss.
    """
    usual = torch.isfinite(loss) & (loss <= highest)
    return torch.where(usual, torch.ones_like(loss), torch.full_like(loss, torch.nan))


def skipped_in_a_row(rows: Sequence[Mapping[str, float]]) -> int:
    count = 0
    while count < len(rows) and SKIPPED in rows[-1 - count]:
        count += 1
    return count


class Preemption:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
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
        if self.asked and error.exc_type is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        else:
            sys.__unraisablehook__(error)

    def _note(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # who presses twice does not want to wait
        self.asked = True
