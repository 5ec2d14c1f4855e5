"""Where a training keeps the states that it resumes from: known without torch.

Each is a folder `steps/N` under the checkpoint's own URL; the last one becomes part of the artifact.
"""

from __future__ import annotations

from infra import storage
from infra.errors import Preempted

TRAINING = "training"
"""Folder of the state after the last step, a part of the artifact."""
STEPS = "steps"
TALLY = "tally.json"
"""Written last: a state without it is debris."""
RESUME_FROM = (f"{STEPS}/*/{TALLY}", f"{TRAINING}/*")


def folders(url: str) -> set[int]:
    """Steps of the states, whole or not, below the URL of a checkpoint."""
    place = storage.join(url, STEPS)
    found = storage.list_files(place) if storage.is_folder(place) else {}
    return {int(step) for step, _, _ in (path.partition("/") for path in found) if step.isdigit()}


def whole(url: str) -> set[int]:
    """Steps of the whole states below the URL of a checkpoint."""
    return {step for step in folders(url) if storage.exists(storage.join(url, STEPS, str(step), TALLY))}


def stopped_at_once(title: str, url: str) -> Preempted | None:
    """What a Ctrl-C means that does not wait for the end of a step; None without a whole state to resume from."""
    saved = whole(url)
    return Preempted(f"{title}: stopped at once; run again to go on after step {max(saved)}") if saved else None


def remove_remote(url: str) -> None:
    """Remove the saved states of a training whose artifact stands at a remote URL; a local one's are gone already."""
    steps = storage.join(url, STEPS)
    if not storage.is_local(url) and storage.is_folder(steps):
        storage.remove(steps)
