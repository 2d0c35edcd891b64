"""The two ways a command fails, with the exit statuses that the command line ends with."""


class UserError(Exception):
    """Bad usage or input (exit status 2): one sentence saying what was found, what was expected, what to do."""

    status = 2


class WorkError(Exception):
    """The work itself failed (exit status 1): one sentence saying what happened and what is still intact."""

    status = 1


def reason(error: BaseException) -> str:
    """What a library's error says, in one line that may stand inside a sentence."""
    text = str(error).strip()
    if 'No space left' in text:  # tensorstore says so at the end of a long line
        return 'no space is left'
    return (text or type(error).__name__).splitlines()[0][:200]
