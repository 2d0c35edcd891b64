"""The two ways a command fails, with the exit statuses that the command line ends with."""


class UserError(Exception):
    """Bad usage or input (exit status 2): one sentence saying what was found, what was expected, what to do."""

    status = 2


class WorkError(Exception):
    """The work itself failed (exit status 1): one sentence saying what happened and what is still intact."""

    status = 1
