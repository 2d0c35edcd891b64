"""The state-space recurrence of Mamba-2 in chunks: quadratic inside a chunk, a scan over the chunks' states.

  state_t = exp(dt_t · a) · state_{t-1} + dt_t · x_t ⊗ b_t,      y_t = state_t · c_t

with the state reset at every document boundary (arXiv 2405.21060, section 6). Decays are computed in float32; boundaries are
masks on exponentials of finite differences, never infinities inside a cumulative sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ssd(
    x_BxTxGxMxP: jax.Array,
    dt_BxTxGxM: jax.Array,
    a_GxM: jax.Array,
    b_BxTxGxN: jax.Array,
    c_BxTxGxN: jax.Array,
    segment_ids_BxT: jax.Array | None,
    chunk: int,
    state_BxGxMxPxN: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(y [B, T, G, M, P] in float32, final state [B, G, M, P, N]).

    Shapes: G groups of M heads, P channels a head, N states. With a `state` to start from there are no segments.
    """
    batch, length = x_BxTxGxMxP.shape[:2]
    chunk = min(chunk, length)
    pad = -length % chunk
    if pad:
        # Steps of zero length: they neither decay the state nor add to it.
        fill = lambda u, mode='constant': jnp.pad(u, ((0, 0), (0, pad)) + ((0, 0),) * (u.ndim - 2), mode=mode)
        x_BxTxGxMxP, dt_BxTxGxM, b_BxTxGxN, c_BxTxGxN = map(fill, (x_BxTxGxMxP, dt_BxTxGxM, b_BxTxGxN, c_BxTxGxN))
        segment_ids_BxT = None if segment_ids_BxT is None else fill(segment_ids_BxT, 'edge')
    split = lambda u: u.reshape(batch, -1, chunk, *u.shape[2:])
    x, dt, b, c = map(split, (x_BxTxGxMxP, dt_BxTxGxM, b_BxTxGxN, c_BxTxGxN))
    scaled = x * dt[..., None].astype(x.dtype)  # [B, C, Q, G, M, P]
    cumulative = jnp.cumsum(jnp.moveaxis(dt * a_GxM[None, None, None], 2, -1), axis=-1)  # [B, C, G, M, Q]
    steps = jnp.arange(chunk)
    within = (steps[:, None] >= steps[None, :])[None, None, None, None]
    segments_BxCxQ = None if segment_ids_BxT is None else split(segment_ids_BxT)
    from_start, to_end, carry = crossing(cumulative, segments_BxCxQ)
    if segments_BxCxQ is not None:
        within = within & (segments_BxCxQ[:, :, :, None] == segments_BxCxQ[:, :, None, :])[:, :, None, None]

    difference = cumulative[..., :, None] - cumulative[..., None, :]
    decay = jnp.where(within, jnp.exp(jnp.where(within, difference, 0.0)), 0.0)  # [B, C, G, M, Q, K]
    f32 = {'preferred_element_type': jnp.float32}
    scores = jnp.einsum('bcqgn,bckgn->bcgqk', c, b, **f32)
    weights = (scores[:, :, :, None] * decay).astype(x.dtype)
    y = jnp.einsum('bcgmqk,bckgmp->bcqgmp', weights, scaled, **f32)

    decayed = scaled * jnp.moveaxis(to_end, -1, 2)[..., None].astype(x.dtype)
    added = jnp.einsum('bckgmp,bckgn->cbgmpn', decayed, b, **f32)
    if state_BxGxMxPxN is None:
        state_BxGxMxPxN = jnp.zeros(added.shape[1:], jnp.float32)

    def advance(state: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        carry_BxGxM, added_BxGxMxPxN = inputs
        return carry_BxGxM[..., None, None] * state + added_BxGxMxPxN, state

    final, before_chunk = jax.lax.scan(advance, state_BxGxMxPxN, (jnp.moveaxis(carry, 1, 0), added))
    carried = jnp.einsum('bcqgn,cbgmpn->bcqgmp', c, before_chunk.astype(c.dtype), **f32)
    y = y + carried * jnp.moveaxis(from_start, -1, 2)[..., None]
    return y.reshape(batch, -1, *y.shape[3:])[:, :length], final


def crossing(cumulative_BxCxGxMxQ: jax.Array, segments_BxCxQ: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is left of the state before a chunk at each token, of each token at the chunk's end [B, C, G, M, Q], and of that state
    there [B, C, G, M]; zero across the boundary of a document.
    """
    total = cumulative_BxCxGxMxQ[..., -1]
    to_end = jnp.exp(total[..., None] - cumulative_BxCxGxMxQ)
    from_start, carry = jnp.exp(cumulative_BxCxGxMxQ), jnp.exp(total)
    if segments_BxCxQ is not None:
        last = segments_BxCxQ[:, :, -1]
        before = jnp.concatenate([segments_BxCxQ[:, :1, 0], last[:, :-1]], axis=1)  # the document the carried state belongs to
        heads = lambda u: u[:, :, None, None]
        to_end = jnp.where(heads(segments_BxCxQ == last[..., None]), to_end, 0.0)
        from_start = jnp.where(heads(segments_BxCxQ == before[..., None]), from_start, 0.0)
        carry = jnp.where(heads(last == before), carry, 0.0)
    return from_start, to_end, carry


def ssd_step(
    x_Bx1xGxMxP: jax.Array,
    dt_Bx1xGxM: jax.Array,
    a_GxM: jax.Array,
    b_Bx1xGxN: jax.Array,
    c_Bx1xGxN: jax.Array,
    state_BxGxMxPxN: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One step of the recurrence, for decoding: (y [B, 1, G, M, P] in float32, new state)."""
    dt_BxGxM = dt_Bx1xGxM[:, 0]
    scaled_BxGxMxP = x_Bx1xGxMxP[:, 0].astype(jnp.float32) * dt_BxGxM[..., None]
    b_BxGxN, c_BxGxN = b_Bx1xGxN[:, 0].astype(jnp.float32), c_Bx1xGxN[:, 0].astype(jnp.float32)
    state = state_BxGxMxPxN * jnp.exp(dt_BxGxM * a_GxM[None])[..., None, None]
    state = state + scaled_BxGxMxP[..., None] * b_BxGxN[:, :, None, None]
    return jnp.einsum('bgmpn,bgn->bgmp', state, c_BxGxN)[:, None], state
