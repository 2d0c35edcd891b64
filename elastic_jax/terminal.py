"""What the terminal at hand can show."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def shows_colour(stream: TextIO) -> bool:
    """Whether to colour what is printed there: only a terminal, and not where NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get('IPython')
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, 'kernel')


def shows(text: str, stream: TextIO) -> bool:
    """Whether the stream's encoding has every character of `text`."""
    try:
        text.encode(getattr(stream, 'encoding', None) or 'utf-8')
    except UnicodeEncodeError:
        return False
    return True
