"""How much memory this process has held at once."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Measure from now on, where the system can (Linux)."""
    with suppress(OSError):
        _FORGET.write_text("5")


def peak_gb() -> float:
    """The most resident memory since `forget_peak`, in GiB; where there is no /proc, since the process began."""
    with suppress(OSError):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / (1 << 20), 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 3)
