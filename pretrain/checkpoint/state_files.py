"""Names of the files that a training resumes from. This module does not import torch.

Each is a folder `checkpoints/step-N` under the checkpoint's own URL; the last one becomes part of the artifact.
"""

from __future__ import annotations

from infra.errors import PreemptedError
from infra.storage import filesystem

TRAINING = "training"
"""Folder of the state after the last step, a part of the artifact."""
STATES = "checkpoints"
"""Folder of the states of a training that has not finished."""
TRAIN_STATE = "train_state.json"
"""Written last: a state without it is incomplete."""
RESUME_FROM = (f"{STATES}/*/{TRAIN_STATE}", f"{TRAINING}/*")


_PREFIX = "step-"


def folder_name(step: int) -> str:
    """Name of the folder that holds the state after a step."""
    return f"{_PREFIX}{step}"


def list_steps(url: str) -> set[int]:
    """Steps of the saved states, complete or not, below the URL of a checkpoint."""
    folder = filesystem.join(url, STATES)
    names = (
        {path.partition("/")[0] for path in filesystem.list_files(folder)} if filesystem.is_folder(folder) else set()
    )
    return {int(name.removeprefix(_PREFIX)) for name in names if name.startswith(_PREFIX)}


def list_complete_steps(url: str) -> set[int]:
    """Steps of the complete states below the URL of a checkpoint."""
    return {
        step
        for step in list_steps(url)
        if filesystem.exists(filesystem.join(url, STATES, folder_name(step), TRAIN_STATE))
    }


def interrupted_error(title: str, url: str) -> PreemptedError | None:
    """What a Ctrl-C means that does not wait for the end of a step; None without a whole state to resume from."""
    saved = list_complete_steps(url)
    return PreemptedError(f"{title}: stopped at once; run again to resume after step {max(saved)}") if saved else None


def remove_remote(url: str) -> None:
    """Remove the saved states of a training whose artifact stands at a remote URL; a local one's are gone already."""
    steps = filesystem.join(url, STATES)
    if not filesystem.is_local(url) and filesystem.is_folder(steps):
        filesystem.remove(steps)
