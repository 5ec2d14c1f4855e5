"""Prefect in a process that forks."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import multiprocessing, os

from flows.orchestration.prefect_settings import set_up_prefect

if {is_set_up}:
    set_up_prefect()
from prefect.logging.handlers import APILogWorker

APILogWorker.instance()  # a service, as a flow starts it
child = multiprocessing.get_context("fork").Process(target=print)
child.start()
child.join()
print(child.exitcode, flush=True)
os._exit(0)
"""


def test_a_process_forked_after_a_flow_ends_with_exit_code_0() -> None:
    """Without the repair it ends with 1; once it does not, the repair is needed no more."""
    codes = []
    for is_set_up in (False, True):
        command = [sys.executable, "-c", PROGRAM.format(is_set_up=is_set_up)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        codes += done.stdout.split()
    assert codes == ["1", "0"]
