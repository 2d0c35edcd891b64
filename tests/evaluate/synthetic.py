"""A run's workdir with every kind of line that training writes, in honest shapes, without training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE
from elastic_jax.evaluate.frontier_files import Frontier, FrontierRow
from elastic_jax.evaluate.summary import summary_rows
from elastic_jax.metrics import MetricsWriter
from elastic_jax.train.config import default_config, stage

PARENT = Arch.from_pattern(
    'ME-M*ME-',
    vocab=264,
    embed=128,
    mamba=Mamba(heads=16, head_dim=16, groups=4, state=32, chunk=64),
    attention=Attention(kv_heads=2, query_heads=4, head_dim=32),
    mlp=MLP(width=384),
    moe=MoE(experts=8, expert_width=128, top_k=2, shared_width=128),
)
MID = {'embed': 112, 'mamba_heads': 12, 'mlp': 288, 'mlp@7': 192, 'experts': 8, 'expert_width': 96}
SMALL = {'embed': 64, 'mamba_heads': 8, 'mlp': 192, 'mlp@7': 96, 'experts': 6, 'expert_width': 64, 'shared_width': 64}
ARCHS = {'full': PARENT, 'mid': PARENT.narrow(MID), 'small': PARENT.narrow(SMALL)}
TARGETS = {'full': 1.0, 'mid': 0.7, 'small': 0.45}
SCORES = {'full': (2.0, 1.98), 'mid': (3.0, 2.2), 'small': (5.0, 2.3)}  # bits per byte before and after
CHOICES = {'embed': [128, 112, 96, 64], 'mamba_heads': [16, 12, 8], 'mlp': [384, 288, 192, 96], 'experts': [8, 6, 4]}
ROWS = {'mlp': 2}
STEPS = {'pretrain': 400, 'search': 120, 'short': 250, 'long': 60}
PARTS = ('nothing', 'pretrain', 'search', 'short', 'done')


def config() -> ConfigDict:
    """The config of such a run."""
    made = default_config()
    made.name, made.curriculum, made.budgets = 'synthetic', tuple(STEPS), ConfigDict(TARGETS)
    made.arch.update({'pattern': PARENT.pattern, 'vocab': PARENT.vocab, 'embed': PARENT.embed})
    for name, steps in STEPS.items():
        kind = name if name in ('pretrain', 'search') else 'elastic'
        made.stages[name] = stage(kind, steps, 1024 if name == 'long' else 256, 8)
    return made


def write_run(workdir: Path, until: str = 'done', every: int = 5) -> Path:
    """Fills `workdir` as a run leaves it that got to the middle of stage `until`, or to its end with 'done'."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / 'config.json').write_text(json.dumps(json.loads(config().to_json()), indent=1))
    writer, rng, start = MetricsWriter(workdir), np.random.default_rng(0), 0
    if until == 'nothing':
        return workdir
    for name, steps in STEPS.items():
        end = start + (steps // 2 if name == until else steps)
        writer.write('stage', start, stage=name, event='start')
        for step in range(start + every, end + 1, every):
            _write_step(writer, rng, name, step, step - start, steps)
        if name == until:
            return workdir
        if name == 'search':
            _write_frozen(writer, end)
        writer.write('stage', end, stage=name, event='end')
        start = end
    after = {name: {'bits_per_byte': score[1]} for name, score in SCORES.items()}
    before = {name: {'bits_per_byte': score[0]} for name, score in SCORES.items()}
    rows, parent = summary_rows(ARCHS, PARENT, after, before, {'bits_per_byte': 2.0}, 256)
    writer.write('final', start, rows=rows, parent=parent)
    for name in ARCHS:
        text = f'path):\n        """Reads <{name}> & closes."""\n        return self._file.read(path)\n'
        writer.write('samples', start, budget=name, prompt='def read(self, ', text=text)
    return workdir


def _write_step(writer: MetricsWriter, rng: np.random.Generator, stage_name: str, step: int, n: int, steps: int) -> None:
    done, noise = n / steps, lambda scale: float(np.exp(rng.normal(0, scale)))
    losses, drawn = {}, list(ARCHS)
    if stage_name == 'pretrain':
        losses['loss'] = (1.2 + 4.3 * np.exp(-n / 60)) * noise(0.05)
        drawn = ['full']
    else:
        if stage_name == 'search':
            drawn = [str(rng.choice(list(ARCHS)))]
        floor = {'full': 0.004, 'mid': 0.07, 'small': 0.22}
        level = {'search': 9.0 - 5.0 * done, 'short': 1.0 + 4.0 * np.exp(-n / 40), 'long': 1.1}[stage_name]
        losses = {f'loss/{name}': floor[name] * level * noise(0.12) for name in drawn}
        losses['loss'] = sum(losses.values()) / len(losses)
    writer.write(
        'train',
        step,
        stage=stage_name,
        stage_step=n,
        **losses,
        grad_norm=noise(0.3),
        skipped=0,
        tokens_per_second=5700.0 * noise(0.05) if stage_name == 'pretrain' else 2400.0 * noise(0.05),
        seconds=0.4,
        data_seconds=0.001,
        flops_per_second=2.5e12,
        mfu=0.4,
    )
    seconds = {'startup': 4.0, 'compile': 10.0, 'data': 0.001 * n, 'step': 0.4 * n, 'eval': 1.0, 'save': 2.0, 'other': 0.5}
    total = sum(seconds.values())
    start = f'2026-11-24T1{list(STEPS).index(stage_name)}:00:00+00:00'  # a process for each stage
    writer.write('goodput', step, process_start=start, total=total, seconds=seconds, goodput=seconds['step'] / total)
    if stage_name == 'search':
        _write_router(writer, step, done)
    load = {}
    for name in drawn:
        experts = ARCHS[name].layer_widths('experts')
        load[name] = {f'layer_{i:03d}': rng.dirichlet(np.full(count, 12.0)) for i, count in experts.items()}
    writer.write('experts', step, load=load)
    if stage_name != 'pretrain' and n % 25 == 0:
        for name, (old, new) in SCORES.items():
            score = new + (old - new) * np.exp(-3 * done)
            writer.write('eval', step, stage=stage_name, budget=name, loss=score * np.log(2), bits_per_byte=score)
            for evaluator, scores in evaluated(name, score).items():
                writer.write('evaluator', step, stage=stage_name, budget=name, evaluator=evaluator, scores=scores)


def evaluated(name: str, score: float) -> dict[str, dict[str, float]]:
    """What two evaluators say of a budget at a held-out score."""
    right = 0.9 - 0.1 * score + 0.01 * list(ARCHS).index(name)
    return {
        'notes': {'loss': 1.1 * score, 'bits_per_byte': 1.2 * score},
        'sums': {'accuracy': right, 'accuracy_per_byte': right, 'chance': 0.25, 'questions': 40},
    }


def write_frontier(workdir: Path, step: int) -> list[dict[str, str]]:
    """What `elastic pareto` leaves in WORKDIR/pareto: the budgets, and a better and a worse size. Returns the rows."""
    found = [
        (True, 'small', 540e3, 2.3),
        (True, '', 700e3, 2.25),
        (False, '', 710e3, 2.4),
        (True, 'mid', 820e3, 2.2),
        (True, 'full', 1.21e6, 1.98),
    ]
    rows = [
        FrontierRow(best, name, 'trained' if name else 'search', cost, score, int(cost), int(cost), 4, 5, f'embed=64,mlp={n}')
        for n, (best, name, cost, score) in enumerate(found)
    ]
    text = Frontier('parameters', '', str(workdir), step, rows, 1.21e6).csv()
    (workdir / 'pareto').mkdir()
    (workdir / 'pareto' / 'frontier.csv').write_text(text)
    return list(csv.DictReader(text.splitlines()))


def _write_router(writer: MetricsWriter, step: int, done: float) -> None:
    probabilities: dict[str, dict[str, np.ndarray]] = {}
    for b, budget in enumerate(TARGETS):
        probabilities[budget] = {}
        for axis, widths in CHOICES.items():
            rows = []
            for row in range(ROWS.get(axis, 1)):
                goal = min(len(widths) - 1, b + (row if b else 0))
                logits = 10.0 * done**1.5 * -np.abs(np.arange(len(widths)) - goal)
                rows.append(np.exp(logits) / np.exp(logits).sum())
            probabilities[budget][axis] = np.stack(rows)
    share = {name: target + 0.2 * (1 - done) for name, target in TARGETS.items()}
    writer.write('router', step, stage='search', probabilities=probabilities, share=share, choices=CHOICES)


def _write_frozen(writer: MetricsWriter, step: int) -> None:
    whole = summary_rows({}, PARENT, {}, {}, {'bits_per_byte': 2.0}, 256)[1]['parameters']
    budgets = {}
    for name, arch in ARCHS.items():
        share = summary_rows({}, arch, {}, {}, {'bits_per_byte': 2.0}, 256)[1]['parameters'] / whole
        note = 'no smaller point of the grid is nearer: add choices between those there are' if name == 'small' else ''
        shares = {'target': TARGETS[name], 'argmax_share': min(1.0, 1.04 * share), 'share': share}
        budgets[name] = shares | {'note': note, 'widths': arch.widths()}
    writer.write('frozen', step, budgets=budgets)
    for name, hard in (('full', 1.386), ('mid', 1.71), ('small', 2.30)):
        writer.write('hardening', step, budget=name, soft_loss=hard - 0.03, hard_loss=hard)
