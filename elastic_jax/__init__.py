"""elastic_jax: one parent language model in, one checkpoint with several nested models out.

Elastic means nested widths here, not surviving lost hosts.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import elastic_jax` (and the command's --help) stays quick.
    if name in ('open_checkpoint', 'Checkpoint', 'Model', 'Sampling'):
        from elastic_jax import api

        return getattr(api, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
