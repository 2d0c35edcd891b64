"""What every test shares."""

import os

# Tests compile a great deal and compute little: code that is not optimised compiles three times as fast.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'.strip()

import hypothesis
import jax

# A forgotten dimension raises instead of being broadcast.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Compiling takes as long as it takes; the same examples every time, so that a red test stays red.
hypothesis.settings.register_profile('tests', deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile('tests')
