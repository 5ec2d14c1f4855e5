"""What a check found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    name: str
    status: Status
    message: str
    """What was found."""
    remedy: str = ""
    """What to do, where it is not ok."""


def ok(name: str, message: str) -> Finding:
    return Finding(name, "ok", message)


def warn(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, "warn", message, remedy)


def fail(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, "fail", message, remedy)


def guarded(name: str, check: Callable[[], Finding], remedy: str) -> Finding:
    """What a check finds; one that raises has failed, and says why in a line."""
    try:
        return check()
    except Exception as error:  # libraries that are broken raise anything when they are imported
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return fail(name, reason[0], remedy)
