"""Prefect in a process that forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing

from flows.orchestration.ephemeral_server import start_ephemeral_server

start_ephemeral_server()
from prefect import flow

flow(lambda: 1, name="one")()
child = multiprocessing.get_context("fork").Process(target=print)
child.start()
child.join()
print(child.exitcode)
"""


@pytest.mark.multiprocess
def test_a_process_forked_after_a_flow_ends_with_exit_code_0(tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"], done.stderr
