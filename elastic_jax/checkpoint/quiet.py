"""What Orbax prints and users need not see."""

from __future__ import annotations

import atexit
import gc
import logging
import sys
from collections.abc import Callable
from typing import Any


class _Filter(logging.Filter):
    """Drops two things: that chunks are small, said for every array, when they are meant to be; and tracebacks of failed
    saves, said by each of Orbax's threads, when the failure itself comes out of the manager as one WorkError.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == 'asyncio':
            return not ('exception was never retrieved' in record.getMessage() and 'async_serialize' in record.getMessage())
        if 'orbax' not in record.pathname:
            return True
        return not record.exc_info and 'target_byte_size too small' not in str(record.msg)


class _Unraisable:
    """When one write of a save fails, Orbax closes its event loop under the others, and each of them would report that."""

    def __init__(self, before: Callable[..., Any]):
        self.before = before

    def __call__(self, unraisable: Any) -> None:
        abandoned = unraisable.object is None and str(unraisable.exc_value) == 'Event loop is closed'
        if not abandoned and 'async_serialize_from_host' not in repr(unraisable.object):
            self.before(unraisable)


def quiet_orbax() -> None:
    """Does nothing the second time."""
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).addFilter(_FILTER)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)
        # Writes that a failed save abandoned are cleared away while Python can still do so, not when it is half gone.
        atexit.register(gc.collect)


_FILTER = _Filter()
