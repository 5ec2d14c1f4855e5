"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line: the thing that is wrong, then the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
