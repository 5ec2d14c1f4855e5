"""How much memory this process has held at once."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Measure from now on, where the system can (Linux)."""
    with suppress(OSError):
        _FORGET.write_text("5")


def peak_memory_gb() -> float:
    """The most resident memory since `reset_peak_memory`, in GiB; where there is no /proc, since the process began."""
    with suppress(OSError, StopIteration):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / (1 << 20), 3)
    unit = 1 if sys.platform == "darwin" else 1 << 10  # bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 30), 3)
