"""Exceptions that mean something to the command line, and the exit codes of commands and ranks."""

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_LOCKED = 73
"""Another process is making the same artifact (EX_CANTCREAT)."""
EXIT_PREEMPTED = 75
"""Asked to stop, with the state saved (EX_TEMPFAIL); launchers requeue on it."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line: the thing that is wrong, then the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class ArtifactLockedError(UserError):
    """Another process is making the same artifact. Who has time may wait and look again."""


class PreemptedError(Exception):
    """The stage was asked to stop, has saved its state and can go on from it.

    The command line exits with code 75, "try again" (EX_TEMPFAIL), on which launchers requeue.
    """


class RankDiedError(ChildProcessError):
    """Ranks ended without a word of their own: killed, their machine lost, or of an error that only a log tells."""


class RegressionError(Exception):
    """Scores fell below what was asked for. Nobody's mistake, and no success either."""
