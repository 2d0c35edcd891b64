"""Held-out scores: nats and bits from the logits in float64, one compiled program, packed rows scored as their documents."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from elastic_jax.arch import MLP, Arch
from elastic_jax.errors import WorkError
from elastic_jax.evaluate.perplexity import _summed_loss, evaluate
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.decoder import Decoder
from elastic_jax.model.params import init_params
from elastic_jax.nest.slice import slice_params
from tests.tiny import HYBRID

SMALL = HYBRID.narrow(embed=24, mamba_heads=4, mlp=32, experts=4, expert_width=8, shared_width=16)
DENSE = Arch.from_pattern('-', vocab=HYBRID.vocab, embed=16, mlp=MLP(width=32))
SHARP = 40.0  # times the initial unembedding, so that losses are far from ln V and from each other


def sharp_params(arch, layout=FLAT):
    params = init_params(jax.random.key(0), arch, layout)
    return params | {'unembed': jax.tree.map(lambda x: SHARP * x, params['unembed'])}


def random_batches(count, rows=2, length=19, seed=0):
    """Packed rows with padding at the end, tokens of one to four bytes, and weights that are not all one."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        tokens = rng.integers(0, HYBRID.vocab, (rows, length + 1)).astype(np.int32)
        segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
        starts = np.array([[np.flatnonzero(row == own)[0] for own in row] for row in segments])
        mask = (rng.random((rows, length)) > 0.3).astype(np.float32)
        mask[0, 0] = 0.5
        mask[:, -3:] = 0.0
        batches.append(
            {
                'tokens': tokens[:, :-1],
                'targets': tokens[:, 1:],
                'segment_ids': segments,
                'positions': (np.arange(length) - starts).astype(np.int32),
                'loss_mask': mask,
                'target_bytes': rng.integers(1, 5, (rows, length)).astype(np.float32),
            }
        )
    return batches


def brute_force(params, arch, batches, layout):
    """Total nats, weights and bytes, one token after the other in float64."""
    nats = weights = text_bytes = 0.0
    apply = jax.jit(Decoder(arch, layout).apply)
    for batch in batches:
        logits_BxTxV = np.asarray(
            apply({'params': params}, batch['tokens'], batch['segment_ids'], batch['positions']), np.float64
        )
        for b, t in np.ndindex(batch['targets'].shape):
            logit_V = logits_BxTxV[b, t]
            top = logit_V.max()
            log_z = top + math.log(sum(math.exp(value - top) for value in logit_V))
            weight = float(batch['loss_mask'][b, t])
            nats += weight * (log_z - logit_V[batch['targets'][b, t]])
            weights += weight
            text_bytes += weight * float(batch['target_bytes'][b, t])
    return nats, weights, text_bytes


def test_scores_of_a_slice_equal_brute_force():
    layout = Layout(mlp=2, shared_width=4, experts=2, kv_heads=2)
    params = slice_params(sharp_params(HYBRID, layout), HYBRID, SMALL, layout)
    batches = random_batches(3)
    nats, weights, text_bytes = brute_force(params, SMALL, batches, layout)
    score = evaluate(params, SMALL, iter(batches), chunk=8)
    assert score['loss'] == pytest.approx(nats / weights, rel=1e-5)
    assert score['perplexity'] == pytest.approx(math.exp(nats / weights), rel=1e-4)
    assert score['bits_per_byte'] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert score['tokens'] == pytest.approx(weights) and score['bytes'] == pytest.approx(text_bytes)
    assert abs(score['loss'] - math.log(HYBRID.vocab)) > 0.5, 'the model is far from uniform, or the case shows nothing'


def test_a_uniform_model_costs_log2_of_the_vocabulary_per_token():
    params = jax.tree.map(np.zeros_like, init_params(jax.random.key(0), DENSE))
    batch = random_batches(1)[0] | {'target_bytes': np.full((2, 19), 4.0, np.float32)}
    score = evaluate(params, DENSE, [batch])
    assert score['perplexity'] == pytest.approx(HYBRID.vocab, rel=1e-6)
    assert score['bits_per_byte'] == pytest.approx(math.log2(HYBRID.vocab) / 4, rel=1e-6)


def test_packed_documents_score_as_if_alone():
    mixing = dataclasses.replace(HYBRID, mixers=HYBRID.mixers[:1] + HYBRID.mixers[2:3])  # 'M*': what mixes tokens
    params = sharp_params(mixing)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, HYBRID.vocab, length + 1).astype(np.int32) for length in (11, 11, 6)]
    length = sum(len(document) - 1 for document in documents)

    def batch_of(parts):
        join = lambda arrays: np.concatenate(arrays)[None]
        own = {
            'tokens': join([part[:-1] for part in parts]),
            'targets': join([part[1:] for part in parts]),
            'segment_ids': join([np.full(len(part) - 1, n + 1, np.int32) for n, part in enumerate(parts)]),
            'positions': join([np.arange(len(part) - 1, dtype=np.int32) for part in parts]),
        }
        return own | {key: np.ones(own['tokens'].shape, np.float32) for key in ('loss_mask', 'target_bytes')}

    packed = evaluate(params, mixing, [batch_of(documents)])
    alone = evaluate(params, mixing, [batch_of([document]) for document in documents])
    assert packed['tokens'] == alone['tokens'] == length
    assert packed['loss'] == pytest.approx(alone['loss'], rel=1e-5)


def test_one_program_per_arch_and_shape_is_kept():
    params, batches = sharp_params(DENSE), random_batches(3, rows=3, length=9)
    child = DENSE.narrow(mlp=16)
    before = _summed_loss._cache_size()
    losses = [evaluate(jax.tree.map(lambda x, by=by: x * by, params), DENSE, batches)['loss'] for by in (1.0, 0.5)]
    assert _summed_loss._cache_size() == before + 1
    assert losses[0] != losses[1]
    evaluate(slice_params(params, DENSE, child, FLAT), child, batches)
    assert _summed_loss._cache_size() == before + 2


def test_nothing_to_score_and_a_diverged_model():
    params = sharp_params(DENSE)
    silent = random_batches(1)[0]
    silent['loss_mask'] = np.zeros_like(silent['loss_mask'])
    for batches in ([], [silent]):
        with pytest.raises(WorkError, match='no held-out token'):
            evaluate(params, DENSE, batches)
    broken = params | {'final_norm': jax.tree.map(lambda x: x * np.nan, params['final_norm'])}
    score = evaluate(broken, DENSE, random_batches(1))
    assert math.isnan(score['loss']) and math.isnan(score['perplexity']) and math.isnan(score['bits_per_byte'])
    sure = params | {'unembed': jax.tree.map(lambda x: 1e5 * x, params['unembed'])}
    assert evaluate(sure, DENSE, random_batches(1))['perplexity'] == math.inf
