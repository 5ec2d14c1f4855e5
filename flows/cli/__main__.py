"""`python -m flows.cli` is `fovea`."""

from flows.cli.main import command_line

command_line()
