"""The frozen parent's top-k logits, computed once for all that is going to be trained on a stream of text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from elastic_jax.arch import Arch
from elastic_jax.data.pipeline import Batches, make_iterator
from elastic_jax.data.stream import endless_stream
from elastic_jax.data.teacher import TeacherCache, TeacherSpec
from elastic_jax.errors import UserError, WorkError
from elastic_jax.model.losses import top_k_log_probs
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.processes import all_agree, check_same, is_main, together
from elastic_jax.parallel.sharding import batch_spec
from elastic_jax.train.curriculum import Stage
from elastic_jax.train.gradients import manual
from elastic_jax.train.persist import initial_params
from elastic_jax.train.programs import BATCH_KEYS, abstract_teacher
from elastic_jax.train.setup import Plan, make_plan
from elastic_jax.train.step import StepConfig, step_context, teacher_head


def parameters_hash(params: Any) -> str:
    """A digest of parameters that no sharding changes: sums of their bits, weighed by place, modulo 2³²."""
    digest = hashlib.blake2b(digest_size=8)
    for path, sums in jax.tree.leaves_with_path(jax.device_get(_bit_sums(params))):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(sums, np.uint32).tobytes())
    return digest.hexdigest()


@jax.jit
def _bit_sums(params: Any) -> Any:
    def of_leaf(leaf: jax.Array) -> list[jax.Array]:
        kind = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for dim, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
        mixed = (bits ^ (place * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
        return [jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32), jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)]

    return jax.tree.map(of_leaf, params)


def teacher_spec(plan: Plan, stage: Stage, parent: str) -> TeacherSpec:
    """What the cache of one stage is of; `parent` is the hash of the teacher's parameters."""
    stream = endless_stream(plan.data(stage), 'train', stage.context, plan.config.seed + stage.start)
    own, identity = plan.config.teacher_cache, Batches(stream, stage.batch_size).identity()
    return TeacherSpec(identity, parent, plan.parent.vocab, own.k, own.tail, stage.context, plan.config.dtype)


def open_cache(plan: Plan, stage: Stage, parent: str) -> TeacherCache:
    """The finished cache that a stage reads. Raises UserError when it is not there."""
    return TeacherCache.open(plan.config.teacher_cache.path, teacher_spec(plan, stage, parent), stage.steps)


def make_teacher_program(parent: Arch, k: int, config: StepConfig) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """Jitted (teacher's parameters, batch) -> (ids [B, T, K], log-probabilities [B, T, K + 1] in float16)."""

    def run(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        context = step_context(batch, parent, config)
        hidden, kernel = teacher_head(params, batch, parent, context, config)
        ids, log_p = top_k_log_probs(hidden, kernel, k, config.chunk, context.shards.of('vocab'))
        return ids, log_p.astype(jnp.float16)

    if config.mesh is None:
        return jax.jit(run)
    rows = batch_spec(config.mesh)
    return jax.jit(manual(run, config, (config.specs(parent), rows), (rows, rows)))


def cache_teacher(config: ConfigDict, say: Callable[[str], None]) -> list[TeacherCache]:
    """Writes the cache of every stage after pretraining, or goes on with it; one that is complete is left as it is.

    Raises: UserError for a config without a parent's checkpoint or a folder to write to.
    """
    with config.unlocked():
        config.teacher = 'cached'
    plan = together(lambda: make_plan(config))
    check_same({'config': config.to_json()}, 'start all of them with the same arguments and config file')
    place = together(plan.place)
    params = initial_params(plan, place)
    parent = parameters_hash(params)
    params = as_teacher(params, plan, place)
    return [_cache_stage(plan, stage, place, params, parent, say) for stage in plan.stages]


def as_teacher(params: Any, plan: Plan, place: Placement) -> Any:
    """The parent's parameters in the dtypes that the frozen teacher is kept in: what must be float32 stays so."""
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, abstract_teacher(plan, place))
    return place.make(lambda tree: jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), tree, dtypes), params)


def _cache_stage(plan: Plan, stage: Stage, place: Any, params: Any, parent: str, say: Callable[[str], None]) -> TeacherCache:
    spec, root = teacher_spec(plan, stage, parent), plan.config.teacher_cache.path
    try:
        cache = TeacherCache.open(root, spec, stage.steps)
        say(f'{stage.name}: {cache.folder} is complete already')
        return cache
    except UserError:
        pass
    cache = TeacherCache(root, spec, stage.steps, place.all_rows(stage.batch_size))
    if is_main():
        cache.begin()
    all_agree(True)  # no process looks for files before those that do not fit are gone
    rows = place.rows(stage.batch_size)
    step_config = plan.step_config(stage, place.mesh if place.distributed else None)
    program = make_teacher_program(plan.parent, spec.k, step_config)
    todo = [group for group in range(cache.groups) if not all_agree(all(cache.has(group, *own) for own in rows))]
    position, batches = None, None
    for done, group in enumerate(todo):
        numbers = cache.batches_of(group)
        if position != numbers.start:
            seed = plan.config.seed + stage.start
            batches = make_iterator(
                plan.data(stage),
                split='train',
                batch_size=stage.batch_size,
                context=stage.context,
                seed=seed,
                rows=rows,
                start_batch=numbers.start,
                end=stage.steps,
            )
        found = []
        for _ in numbers:
            batch = next(batches)
            found.append(program(params, place.put_batch({key: batch[key] for key in BATCH_KEYS}, stage.batch_size)))
        for first, last in rows:
            local = [[_local_rows(array, first, last) for array in pair] for pair in found]
            ids, log_p = (np.stack(arrays) for arrays in zip(*local, strict=True))
            try:
                cache.write(group, first, ids, log_p)
            except OSError as error:
                more = 'free some space, and the same command goes on'
                raise WorkError(f'cannot write to {cache.folder} ({error}); {more}') from error
        position = numbers.stop
        say(f'{stage.name}: {done + 1} of {len(todo)} files, {spec.bytes_per_token} bytes per token')
    all_agree(True)  # all have written
    if is_main():
        cache.finish()
    return cache


def _local_rows(array: jax.Array, first: int, last: int) -> np.ndarray:
    """Rows of an array that is split by rows, from this process's devices."""
    parts = {shard.index[0].indices(array.shape[0])[0]: shard for shard in array.addressable_shards}
    own = [np.asarray(parts[start].data) for start in sorted(parts) if first <= start < last]
    return np.concatenate(own)
