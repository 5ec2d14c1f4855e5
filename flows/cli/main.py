"""The command line: `fovea STAGE FILE.yaml --key value`. Flags and file share the stage's configuration model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from flows.cli.commands import COMMANDS, Command
from infra.errors import (
    EXIT_FAILURE,
    EXIT_LOCKED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    ArtifactLockedError,
    PreemptedError,
    RegressionError,
    UserError,
)
from infra.notices import print_notice


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if tokens and tokens[0] in COMMANDS:
            _run(COMMANDS[tokens[0]], tokens[1:])
        else:
            _run_plain(tokens)
    except ArtifactLockedError as error:
        _end(EXIT_LOCKED, str(error))
    except UserError as error:
        _end(EXIT_USER_ERROR, str(error))
    except PreemptedError as stopped:
        _end(EXIT_PREEMPTED, str(stopped))
    except (RegressionError, ChildProcessError) as error:  # of a process its own traceback or message was shown
        _end(EXIT_FAILURE, str(error))
    except KeyboardInterrupt:
        _end(130, "interrupted; run again to resume")


def command_line() -> None:
    """The program `fovea`: once its last line is written, a further Ctrl-C only disturbs what is being cleaned up."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, head say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except SystemExit:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise


def _run(command: Command, tokens: list[str]) -> None:
    """Run a command on the configuration that words and flags give."""
    from flows.cli import configuration

    if {"--help", "-h", "--help-all"} & set(tokens):
        print(configuration.help_page(command, "--help-all" in tokens))
    elif "--print-config" in tokens:
        left = [token for token in tokens if token != "--print-config"]
        print(configuration.to_yaml(configuration.resolve_config(command, left)), end="")
    else:
        config = configuration.resolve_config(command, tokens)
        print_notice(f"{command.name}: checking inputs")
        command.run(config)


def _run_plain(tokens: list[str]) -> None:
    """Run a command that takes no configuration file, or show the page of all commands."""
    from cyclopts import CycloptsError

    from flows.cli.app import app

    try:
        app(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise UserError(f"{error}; see fovea {' '.join(error.command_chain or ())} --help") from None


def _end(code: int, message: str) -> None:
    print(f"fovea: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    command_line()
