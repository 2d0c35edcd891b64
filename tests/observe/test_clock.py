"""The clock's parts sum to the time that passed, whatever is nested, raised or compiled in them."""

import threading
import time
from contextlib import closing

import jax
import jax.numpy as jnp
import pytest

from elastic_jax.observe.clock import PARTS, Clock


def test_parts_sum_to_the_time_that_passed_and_inner_ones_are_taken_out():
    began = time.perf_counter()
    with closing(Clock()) as clock:
        time.sleep(0.05)
        clock.ready()
        with clock.part('step'):
            time.sleep(0.1)
            with clock.part('save'):
                time.sleep(0.15)
            time.sleep(0.05)
        with pytest.raises(KeyError), clock.part('eval'):
            time.sleep(0.05)
            raise KeyError
        time.sleep(0.1)
        line = clock.goodput()
    seconds, wall = line['seconds'], time.perf_counter() - began
    assert tuple(seconds) == PARTS
    assert sum(seconds.values()) == pytest.approx(line['total']) == pytest.approx(wall, abs=0.02)
    # A busy machine sleeps longer, never shorter.
    least = {'startup': 0.05, 'step': 0.15, 'save': 0.15, 'eval': 0.05, 'other': 0.1}
    assert all(seconds[part] >= enough for part, enough in least.items())
    assert seconds['compile'] == seconds['data'] == 0
    assert line['goodput'] == pytest.approx(seconds['step'] / line['total'])


def test_compiling_counts_once_wherever_it_happens_and_only_on_this_thread():
    inner = jax.jit(lambda x: jnp.sin(x) @ x)
    slow = jax.jit(lambda x: sum(inner(x * n) for n in range(40)))  # traced inside a trace
    x, y = jnp.ones((8, 8)), jnp.ones((4, 4))
    with closing(Clock()) as clock:
        clock.ready()
        with clock.part('step'):
            began = time.perf_counter()
            slow(x).block_until_ready()
            took = time.perf_counter() - began
        seconds = clock.goodput()['seconds']
        assert 0.5 * took < seconds['compile'] <= took
        assert seconds['step'] + seconds['compile'] == pytest.approx(took, abs=0.02)
        with clock.part('data'):
            other = threading.Thread(target=lambda: slow(y).block_until_ready())
            other.start()
            other.join()
        later = clock.goodput()['seconds']
        assert later['compile'] == seconds['compile'] and later['data'] > 0
    slow(jnp.ones((3, 3)))
    assert clock.goodput()['seconds']['compile'] == seconds['compile'], 'closed'
