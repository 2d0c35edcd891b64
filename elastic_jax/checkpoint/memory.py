"""Giving back to the system what was freed: tensorstore's threads leave it in pools of their own, which then only grow."""

from __future__ import annotations

import ctypes

# Bytes that are read or written between two returns. Each walks through every pool, so it is not done for every small array.
EVERY = 1 << 28


class FreedMemory:
    """`passed(nbytes)` after so much was read or written returns freed memory now and then, where the C library can."""

    def __init__(self) -> None:
        self.trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
        self.since = 0

    def passed(self, nbytes: int) -> None:
        self.since += nbytes
        if self.trim is not None and self.since >= EVERY:
            self.since = 0
            self.trim(0)
