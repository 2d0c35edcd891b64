"""What a command prints of a failure is one sentence; Orbax and asyncio would print a traceback for each of their threads."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import sys
from typing import Any

from absl import logging as absl_logging


@functools.cache
def quiet_failures() -> None:
    """For commands, whose failures come out of Orbax as exceptions too: Orbax logs nothing, and asyncio nothing of its tasks."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        # When one write of a save fails, Orbax closes its event loop under the others.
        if str(unraisable.exc_value) != 'Event loop is closed':
            report(unraisable)

    sys.unraisablehook = report_others
    # Those others are cleared away while Python can still do so, not when it is half gone.
    atexit.register(gc.collect)
