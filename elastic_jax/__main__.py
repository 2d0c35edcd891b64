"""`python -m elastic_jax VERB` is the `elastic` command."""

from elastic_jax.cli import main

main()
