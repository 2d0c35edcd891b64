"""The state of training, as one pytree, and the guarded update that advances it."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from elastic_jax.arch import unknown_name
from elastic_jax.errors import UserError
from elastic_jax.model.params import Table


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. `router` and its optimiser are empty outside search stages.

    Attributes:
      step: steps taken in this stage.
      skipped: updates left out for a non-finite loss or gradient; bad_run: how many of the last in a row.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    router: Any
    router_opt_state: Any
    skipped: jax.Array
    bad_run: jax.Array


def make_optimizer(config: ml_collections.ConfigDict, steps: int, table: Table | None = None) -> optax.GradientTransformation:
    """Adam with clipping and a schedule over `steps`: warm-up, then 'cosine', 'linear' or 'constant'.

    `table` declares the parameters that are trained: weights decay, but not norms, biases and the like, whatever dimensions they
    are stored in. It may be left out where config.weight_decay is 0.
    """
    if config.weight_decay and table is None:
        raise ValueError('weight_decay needs the table of parameters')
    if not config.lr > 0:
        raise UserError(f'optimizer.lr={config.lr} must be above 0')
    warmup = min(config.warmup, max(1, steps // 4))
    decay = max(1, steps - warmup)
    schedules = {
        'cosine': lambda: optax.cosine_decay_schedule(config.lr, decay, config.final_lr / config.lr),
        'linear': lambda: optax.linear_schedule(config.lr, config.final_lr, decay),
        'constant': lambda: optax.constant_schedule(config.lr),
    }
    if config.schedule not in schedules:
        raise UserError(unknown_name('schedule', config.schedule, list(schedules)))
    schedule = optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), schedules[config.schedule]()], [warmup])
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=partial(_decays, table if config.weight_decay else None)),
        optax.scale_by_learning_rate(schedule),
    )


def _decays(table: Table | None, params: Any) -> Any:
    """Whether each parameter is a weight: a matrix of the residual stream, or a convolution."""
    is_weight = lambda param: len(param.axes) > 1 and ('embed' in param.axes or 'conv' in param.axes)
    return {group: {name: table is not None and is_weight(table[group][name]) for name in own} for group, own in params.items()}


def new_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    router: Any = None,
    router_optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """The state at the start of a stage; every stage starts its optimiser anew, with its own warm-up."""
    router = {} if router is None else router
    router_opt_state = {} if router_optimizer is None else router_optimizer.init(router)
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(zero(), params, optimizer.init(params), router, router_opt_state, zero(), zero())


def guarded_update(
    state: TrainState,
    grads: tuple[Any, Any],
    loss: jax.Array,
    optimizer: optax.GradientTransformation,
    router_optimizer: optax.GradientTransformation | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(state after the update, metrics). A non-finite loss or gradient leaves everything but the counters as it was."""
    param_grads, router_grads = grads
    norm = optax.tree.norm(param_grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(router_grads))
    updates, opt_state = optimizer.update(param_grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    router, router_opt_state = state.router, state.router_opt_state
    if router_optimizer is not None:
        updates, router_opt_state = router_optimizer.update(router_grads, state.router_opt_state, state.router)
        router = optax.apply_updates(state.router, updates)
    new = state.replace(params=params, opt_state=opt_state, router=router, router_opt_state=router_opt_state)
    kept = jax.tree.map(lambda fresh, old: jnp.where(finite, fresh, old), new, state)
    bad = jnp.where(finite, 0, 1).astype(jnp.int32)
    kept = kept.replace(step=state.step + 1, skipped=state.skipped + bad, bad_run=(state.bad_run + 1) * bad)
    return kept, {'grad_norm': norm, 'skipped': kept.skipped, 'bad_run': kept.bad_run}
