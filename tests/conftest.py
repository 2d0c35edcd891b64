"""What every test shares."""

import jax

# A forgotten dimension raises instead of being broadcast.
jax.config.update('jax_numpy_rank_promotion', 'raise')
