"""How fast a training runs, and what it needs: of the last steps, for people who watch it."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping

import psutil
import torch

_log = logging.getLogger(__name__)
_WINDOW = 50  # steps
_WARM_UP_SECONDS = 20.0  # seconds after which the share of the peak is worth the seconds that it takes to find it


class ThroughputMeter:
    """Images a second, share of the devices' peak (MFU), memory.

    Args:
        images: of a step, over all ranks.
        device: this rank's.
        share: gives FLOPs of an image and the FLOP/s that all devices can reach; called once, when it is worth it.
        clock: seconds.
    """

    def __init__(
        self,
        images: int,
        device: torch.device,
        share: Callable[[], tuple[float, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images, self._device, self._share, self._clock = images, device, share, clock
        self._started = clock()
        self._ends = deque([self._started], maxlen=_WINDOW + 1)
        self._work: tuple[float, float] | None = None

    @property
    def flops(self) -> float | None:
        """FLOPs of an image, if they are known by now."""
        return self._work[0] if self._work is not None and math.isfinite(self._work[0]) else None

    def update(self) -> dict[str, float]:
        """Call after each step; returns `images_per_second`, `memory_gb` of this rank and, in time, `mfu`."""
        self._ends.append(self._clock())
        seconds = max(self._ends[-1] - self._ends[0], 1e-9)
        speed = self._images * (len(self._ends) - 1) / seconds
        found = {"images_per_second": speed, "memory_gb": self._memory() / 1e9}
        if self._work is None and self._ends[-1] - self._started > _WARM_UP_SECONDS:
            try:
                self._work = self._share()
            except Exception as error:  # nice to know, and no more
                self._work = (math.nan, 1.0)
                _log.warning("no MFU: %s", error)
            self._ends = deque([self._clock()], maxlen=_WINDOW + 1)  # the steps did not take what that took
        if self._work is not None and math.isfinite(self._work[0]):
            flops, peak = self._work
            found["mfu"] = speed * flops / peak
        return found

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return int(psutil.Process().memory_info().rss)


def describe_step(losses: Mapping[str, float], facts: Mapping[str, float]) -> str:
    """A line for people: what matters most first, for a narrow terminal cuts it off."""
    mfu = f", MFU {100 * facts['mfu']:.0f} %" if "mfu" in facts else ""
    speed = f"{facts['images_per_second']:,.0f} images/s{mfu}, {facts['memory_gb']:.1f} GB"
    terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.items() if name != "loss")
    return f"loss {losses.get('loss', math.nan):.3f}, {speed}" + (f"; {terms}" if terms else "")
