"""Progress in a log file: a line now and then, and one at the end."""

from __future__ import annotations

import pytest

from infra import progress as module
from infra.progress import progress


def test_a_log_file_gets_a_line_a_minute_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("pretrain", 10, done=2) as advance:
        for seconds in (10, 70, 80, 140):
            now[0] = seconds
            advance(note=f"loss {seconds}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "pretrain: 4 of 10, 0:03:30 left, loss 70",
        "pretrain: 6 of 10, 0:02:20 left, loss 140",
        "pretrain: 6 in 140.0 s loss 140",
    ]
