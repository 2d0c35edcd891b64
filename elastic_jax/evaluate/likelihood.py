"""How likely a model finds given texts: what multiple choice and evaluation harnesses ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError
from elastic_jax.infer.decoding import bucket
from elastic_jax.infer.placed import everywhere
from elastic_jax.infer.resident import Weights
from elastic_jax.model.context import context_for
from elastic_jax.model.decoder import hidden_states, unembedding

ROWS = 8


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of a continuation: Σ log p of its tokens in nats, whether each was the likeliest, its tokens and its bytes of text."""

    log_p: float
    greedy: bool
    tokens: int
    bytes: int


def likelihoods(weights: Weights, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
    """The likelihood of each continuation given its context; (context, continuation) pairs. An empty context is a new text.

    The two are tokenised together where the context's tokens begin those of both, else one by one. Pairs of similar length
    share a compiled program. Raises UserError for an empty continuation.
    """
    rows, begins = [], []
    for context, continuation in pairs:
        if not continuation:
            raise UserError(f'the continuation of {context[-40:]!r} is empty; give at least one character')
        # Nothing comes before a document in training: only where there is no context does the end of another stand in for it.
        first = list(tokenizer.encode(context)) or [tokenizer.eos_id]
        whole = list(tokenizer.encode(context + continuation))
        if whole[: len(first)] != first or len(whole) == len(first):
            whole = [*first, *tokenizer.encode(continuation)]
        rows.append(whole)
        begins.append(len(first))
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    found: dict[int, Likelihood] = {}
    for start in range(0, len(order), ROWS):
        own = order[start : start + ROWS]
        length = bucket(max(len(rows[n]) for n in own) - 1, 32)
        tokens_BxT = np.zeros((ROWS, length + 1), np.int32)
        for row, n in enumerate(own):
            tokens_BxT[row, : len(rows[n])] = rows[n]
        log_p_BxT, likeliest_BxT = map(np.asarray, _token_log_probs(weights, tokens_BxT))
        for row, n in enumerate(own):
            span = slice(begins[n] - 1, len(rows[n]) - 1)
            total, greedy = float(log_p_BxT[row, span].astype(np.float64).sum()), bool(likeliest_BxT[row, span].all())
            found[n] = Likelihood(total, greedy, span.stop - span.start, len(pairs[n][1].encode()))
    return [found[n] for n in range(len(rows))]


@jax.jit
def _token_log_probs(weights: Weights, tokens_BxT1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log p of every token but the first, whether it was the likeliest): [B, T] each, row after row of logits."""
    params, inputs_BxT, targets_BxT = weights.own(), tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
    context = context_for(inputs_BxT, norm_eps=weights.arch.norm_eps, dtype=weights.dtype)
    hidden_BxTxD, _ = hidden_states(params, inputs_BxT, weights.arch, context)
    kernel_DxV = unembedding(params)

    def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_TxD, target_T = row
        logits_TxV = jnp.einsum('td,dv->tv', hidden_TxD, kernel_DxV.astype(hidden_TxD.dtype)).astype(jnp.float32)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits_TxV), target_T[:, None], axis=-1)[:, 0]
        return log_p, jnp.argmax(logits_TxV, axis=-1) == target_T

    return everywhere(jax.lax.map(one, (hidden_BxTxD, targets_BxT)), weights)
