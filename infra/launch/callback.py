"""Who looks on while ranks run."""

from __future__ import annotations

import sys


class LaunchCallback:
    """Is told what the launcher finds out, and may look for itself every few seconds; this one prints."""

    def on_message(self, message: str) -> None:
        """Take a line about the job: where it waits, that it runs, that it was queued or started again."""
        print(message, file=sys.stderr, flush=True)

    def on_poll(self) -> None:
        """Look at the job's folder, say."""
