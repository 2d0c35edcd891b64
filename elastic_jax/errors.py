"""The two ways a command fails; the command line turns them into exit statuses."""


class UserError(Exception):
    """Bad usage or input (exit status 2): one sentence saying what was found, what was expected, what to do."""


class WorkError(Exception):
    """The work itself failed (exit status 1): one sentence saying what happened and what is still intact."""
