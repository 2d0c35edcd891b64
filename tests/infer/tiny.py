"""Tiny models for generation, and its oracle: one full forward pass for every token."""

import jax
import numpy as np

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE, Rope
from elastic_jax.infer.resident import weights_of
from elastic_jax.model.decoder import Decoder
from elastic_jax.nest.slice import slice_params
from tests.tiny import numpy_params

# A vocabulary of letters, so that text can be read; each budget is narrower along every axis.
ATTENTION = Attention(kv_heads=2, query_heads=2, head_dim=4, rope=Rope())
HYBRID = Arch.from_pattern(
    'M*E-M',
    vocab=24,
    embed=16,
    mamba=Mamba(heads=4, head_dim=4, groups=2, state=4, chunk=8),
    attention=ATTENTION,
    mlp=MLP(width=24),
    moe=MoE(experts=4, expert_width=8, top_k=2, shared_width=8),
)
DENSE = Arch.from_pattern('*-*-', vocab=24, embed=16, attention=ATTENTION, mlp=MLP(width=24, activation='swiglu'), tied=True)
MOE = Arch.from_pattern('*E', vocab=24, embed=16, attention=ATTENTION, moe=MoE(experts=4, expert_width=8, top_k=2, groups=2))
FAMILIES = {'hybrid': HYBRID, 'dense': DENSE, 'moe': MOE}

SMALL_WIDTHS = {
    'embed': 12,
    'query_heads': 1,
    'kv_heads': 1,
    'mamba_heads': 2,
    'mamba_head_dim': 3,
    'mlp': 16,
    'experts': 2,
    'expert_width': 4,
}


def small_of(arch):
    own = {axis.name for axis in arch.axes()}
    return arch.narrow({name: width for name, width in SMALL_WIDTHS.items() if name in own and (name, arch) != ('experts', MOE)})


def budgets_of(arch):
    """Name -> Arch, largest first."""
    return {'full': arch, 'mid': arch.narrow(embed=14), 'small': small_of(arch)}


def random_weights(arch, child=None, seed=0):
    """The weights of `child` (default: the parent), cut from one parent's."""
    child, params = child or arch, numpy_params(arch, seed=seed)
    return weights_of(jax.tree.map(jax.numpy.asarray, slice_params(params, arch, child)), child)


class Letters:
    """A tokenizer of 23 letters; token 23 ends the text."""

    vocab_size, eos_id, stop_ids, spec = 24, 23, (23,), {'kind': 'letters'}

    def encode(self, text):
        return np.asarray([ord(letter) - ord('a') for letter in text], np.int32)

    def decode(self, ids):
        return ''.join(chr(ord('a') + i) for i in ids if i < 23)


LETTERS = Letters()


def ending_at(*stop_ids):
    """The letters, with these tokens as ends of what is generated."""
    tokenizer = Letters()
    tokenizer.stop_ids = stop_ids
    return tokenizer


def full_logits(weights, tokens):
    """Logits [T, V] of one sequence in one pass, in the shape of a long one, so that one program does."""
    padded = np.zeros((1, -(-len(tokens) // 64) * 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_apply(weights.params, padded, weights.arch))[0, : len(tokens)]


_apply = jax.jit(lambda params, tokens, arch: Decoder(arch).apply({'params': params}, tokens), static_argnums=2)


def greedy_by_full_passes(weights, prompt, count, eos=Letters.eos_id):
    """The greedy continuation, each token from a full pass over all before it."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != eos):
        tokens.append(int(full_logits(weights, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
