"""Held-out evaluation during and after a run, and the table and report at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from elastic_jax.arch import Arch
from elastic_jax.data.pipeline import heldout_batches
from elastic_jax.evaluate.evaluators import TaskEvaluator, TextEvaluator, make_evaluators
from elastic_jax.evaluate.perplexity import evaluate, score
from elastic_jax.evaluate.report import write_report
from elastic_jax.evaluate.summary import format_table, summary_rows
from elastic_jax.infer.generate import generate
from elastic_jax.infer.resident import weights_of
from elastic_jax.infer.sampling import Sampling
from elastic_jax.metrics import MetricsWriter, read_metrics
from elastic_jax.model.context import context_for
from elastic_jax.model.decoder import hidden_states, unembedding
from elastic_jax.nest.masks import mask_params, softs
from elastic_jax.nest.router import router_logits, soft_masks
from elastic_jax.nest.slice import slice_params
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.sharding import data_parallelism
from elastic_jax.train.curriculum import Stage
from elastic_jax.train.gradients import summed_loss
from elastic_jax.train.persist import Snapshot
from elastic_jax.train.setup import Plan
from elastic_jax.train.step import elastic_loss


class Evaluator:
    """Evaluates budgets on the same held-out batches throughout a run."""

    def __init__(self, plan: Plan, place: Placement, writer: MetricsWriter):
        self.plan, self.place, self.writer, self.batches = plan, place, writer, None
        self.programs: dict[Any, Callable[..., jax.Array]] = {}
        self.more = {
            name: dataclasses.replace(own, batch_size=self._rows(own.batch_size)) if isinstance(own, TextEvaluator) else own
            for name, own in make_evaluators(plan.config.evaluators, plan.config.data).items()
        }

    def _rows(self, batch_size: int) -> int:
        """The next batch size that splits over the mesh."""
        parts = data_parallelism(self.place.mesh)
        return -(-batch_size // parts) * parts

    def heldout(self) -> list[dict[str, Any]]:
        if self.batches is None:
            config = self.plan.config
            rows = self._rows(config.eval.batch_size)
            self.batches = list(heldout_batches(config.data, rows, config.eval.context, config.eval.batches))
        return self.batches

    def score(self, params: Any, parent: Arch, arch: Arch, batches: int | None = None) -> dict[str, float]:
        """Held-out loss and bits per byte of one slice, on the first `batches`, or all."""
        return self._score(params, parent, arch, self.heldout()[:batches])

    def _score(self, params: Any, parent: Arch, arch: Arch, heldout: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Over a mesh the slice is cut layer by layer, as in training."""
        if not self.place.distributed:
            sliced = slice_params(params, parent, arch, self.plan.layout)
            return evaluate(sliced, arch, heldout, self.plan.config.dtype, self.plan.config.loss_chunk)
        if (parent, arch) not in self.programs:
            config = self.plan.step_config(self.plan.stages[0], self.place.mesh)
            loss_fn = elastic_loss(parent, [('', arch)], (1.0,), config, 'none')
            self.programs[parent, arch] = jax.jit(summed_loss(loss_fn, parent, config))
        program = self.programs[parent, arch]
        return score(lambda inputs: program(params, self.place.put_whole_batch(inputs)), heldout)

    def during(self, at: Snapshot, stage: Stage) -> dict[str, dict[str, float]]:
        """Scores every budget whose widths are known; returns what the manifest keeps of it."""
        scores = {name: _brief(self.score(at.state.params, at.parent, arch)) for name, arch in at.archs.items()}
        for name, own in scores.items():
            self.writer.write('eval', at.step, stage=stage.name, budget=name, **own)
        self.run_more(at, stage.name)
        return scores

    def run_more(self, at: Snapshot, stage: str) -> None:
        """Scores every budget with the evaluators of the config, each on the budget's slice."""
        has_tasks = any(isinstance(run, TaskEvaluator) for run in self.more.values())
        for name, arch in at.archs.items():
            if has_tasks:
                sliced = slice_params(at.state.params, at.parent, arch, self.plan.layout)
                weights = weights_of(sliced, arch, self.plan.layout, self.plan.config.dtype)
            for evaluator, run in self.more.items():
                if isinstance(run, TextEvaluator):
                    scores = self._score(at.state.params, at.parent, arch, run.heldout)
                else:
                    scores = run(weights, self.plan.tokenizer)
                self.writer.write('evaluator', at.step, stage=stage, budget=name, evaluator=evaluator, scores=scores)

    def hardening(self, at: Snapshot, archs: dict[str, Arch], router: Any) -> None:
        """Logs what freezing the soft masks to hard widths does to the held-out loss."""
        plan, batch = self.plan, self.place.put_whole_batch(self.heldout()[0])
        # A program of its own: two Archs are equal whatever their ranking of layers, which the masks go by.
        soft_loss = jax.jit(partial(_soft_loss, parent=at.parent, grid=plan.grid, layout=plan.layout))
        for n, name in enumerate(plan.budgets):
            one_hot = jax.nn.one_hot(n, len(plan.budgets))
            soft = float(soft_loss(at.state.params, router, batch, one_hot, plan.config.router.end_scale))
            hard = self.score(at.state.params, at.parent, archs[name], batches=1)
            self.writer.write('hardening', at.step, budget=name, soft_loss=soft, hard_loss=hard['loss'])

    def final(self, at: Snapshot, teacher: Any) -> dict[str, dict[str, float]]:
        """Scores every budget after elastic training, the same slices before it, and the parent; writes the final rows."""
        after = {name: self.score(at.state.params, at.parent, arch) for name, arch in at.archs.items()}
        before = {name: self.score(teacher, at.parent, arch) for name, arch in at.archs.items()}
        parent_score = self.score(teacher, at.parent, at.parent)
        rows, parent = summary_rows(at.archs, at.parent, after, before, parent_score, self.plan.config.metric_context)
        self.writer.write('final', at.step, rows=rows, parent=parent)
        self.run_more(at, 'final')
        for name, arch in at.archs.items():
            samples = self.plan.config.samples
            prompts, sampling = list(samples.prompts), Sampling(samples.temperature)
            if prompts:
                sliced = slice_params(at.state.params, at.parent, arch, self.plan.layout)
                weights = weights_of(sliced, arch, self.plan.layout)
                completions = generate(weights, self.plan.tokenizer, prompts, samples.tokens, sampling)
                for prompt, completion in zip(prompts, completions, strict=True):
                    self.writer.write('samples', at.step, budget=name, prompt=prompt, text=completion.text)
        return {name: _brief(score) for name, score in after.items()}


def _brief(score: dict[str, float]) -> dict[str, float]:
    return {key: score[key] for key in ('loss', 'bits_per_byte')}


def _soft_loss(
    params: Any, router: Any, batch: Any, one_hot: jax.Array, scale: float, parent: Arch, grid: Any, layout: Any
) -> jax.Array:
    """Cross-entropy of one batch under the router's noiseless soft masks at the final scale."""
    logits = router_logits(router, grid, one_hot)
    probabilities = {axis: jax.nn.softmax(scale * value, axis=-1) for axis, value in logits.items()}
    masks = soft_masks(parent, grid, probabilities, layout)
    context = context_for(batch['tokens'], batch['segment_ids'], batch['positions'], norm_eps=parent.norm_eps)
    masked = mask_params(params, parent, masks, layout)
    hidden_BxTxD, _ = hidden_states(masked, batch['tokens'], parent, context, softs(parent, masks, layout))
    log_q = jax.nn.log_softmax((hidden_BxTxD @ unembedding(masked)).astype(jnp.float32))
    nats_BxT = -jnp.take_along_axis(log_q, batch['targets'][..., None], axis=-1)[..., 0]
    return jnp.sum(nats_BxT * batch['loss_mask']) / jnp.sum(batch['loss_mask'])


def finish(workdir: epath.Path, say: Callable[[str], None]) -> None:
    """Writes the report and prints the final table (the one thing on stdout)."""
    final = [line for line in read_metrics(workdir) if line['kind'] == 'final']
    path = write_report(workdir)
    if final:
        print(format_table(final[-1]['rows'], final[-1]['parent']), flush=True)
    say(f'report: {path}')
