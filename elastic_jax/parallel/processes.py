"""What the processes of a run settle among themselves. With one process all of it is immediate."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_main() -> bool:
    """Whether this is the process that writes logs and reports."""
    return jax.process_index() == 0


def all_agree(own: bool) -> bool:
    """Whether it is true on every process; every process must ask."""
    if jax.process_count() == 1:
        return own
    return bool(np.all(multihost_utils.process_allgather(np.asarray([own]))))


def asked_to_stop(step: int) -> bool:
    """Whether some process got SIGTERM: the same answer on all of them. Every process must ask at every step."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
