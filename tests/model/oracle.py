"""The decoder once more, in float64 numpy with loops over tokens, heads and experts, one document at a time.

Written from method.md and the papers, for comparison: slow, and nothing shared with the library but the shapes of parameters.
"""

import numpy as np

from elastic_jax.arch import MLP, Attention, Mamba


def logits(params, tokens, arch):
    """Logits [T, V] of one document."""
    params = {group: {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()} for group, leaves in params.items()}
    x = params['embedding']['table'][np.asarray(tokens)]
    for i, mixer in enumerate(arch.mixers):
        if mixer is not None:
            layer = params[f'layer_{i:03d}']
            x = x + mix(layer, norm(x, layer['norm'], arch.norm_eps), mixer, arch.norm_eps)
    x = norm(x, params['final_norm']['norm'], arch.norm_eps)
    return x @ (params['embedding']['table'].T if arch.tied else params['unembed']['kernel'])


def mix(layer, x, mixer, eps):
    if isinstance(mixer, Attention):
        return attention(layer, x, mixer, eps)
    if isinstance(mixer, Mamba):
        return mamba(layer, x, mixer, eps)
    if isinstance(mixer, MLP):
        return feed_forward(x, *(flat_mlp(layer, name, mixer) for name in ('up', 'gate', 'down')))
    return moe(layer, x, mixer)[0]


def norm(x, scale, eps):
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def flat_mlp(layer, name, mixer):
    """(matrix [in, out], bias) of one projection, blocks merged."""
    if name not in layer:
        return None
    kernel = layer[name]
    kernel = kernel.reshape(-1, kernel.shape[-1]) if name == 'down' else kernel.reshape(len(kernel), -1)
    return kernel, (layer[f'{name}_bias'].reshape(-1) if mixer.bias else 0.0)


def feed_forward(x, up, gate, down):
    hidden = x @ up[0] + up[1]
    hidden = np.maximum(hidden, 0) ** 2 if gate is None else silu(x @ gate[0] + gate[1]) * hidden
    return hidden @ down[0] + down[1]


def rotate(vector, position, rope):
    """Rotary embedding of one head's vector; frequencies scaled as Llama 3.1 does."""
    half = len(vector) // 2
    result = np.empty_like(vector)
    for j in range(half):
        frequency = rope.theta ** (-2 * j / len(vector))
        if rope.scaling:
            factor, low, high, original = rope.scaling
            wavelength = 2 * np.pi / frequency
            if wavelength > original / low:
                frequency = frequency / factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        cos, sin = np.cos(position * frequency), np.sin(position * frequency)
        result[j] = vector[j] * cos - vector[j + half] * sin
        result[j + half] = vector[j + half] * cos + vector[j] * sin
    return result


def attention(layer, x, mixer, eps):
    length, embed = x.shape
    heads, queries, head_dim = mixer.kv_heads, mixer.query_heads, mixer.head_dim
    bias = lambda name, shape: layer[name].reshape(shape) if mixer.bias else np.zeros(shape)
    q_kernel = layer['q'].reshape(embed, heads, queries, head_dim)
    k_kernel, v_kernel = (layer[name].reshape(embed, heads, head_dim) for name in ('k', 'v'))
    o_kernel = layer['o'].reshape(heads, queries, head_dim, embed)
    y = np.zeros((length, embed))
    for h in range(heads):
        k = x @ k_kernel[:, h] + bias('k_bias', (heads, head_dim))[h]
        v = x @ v_kernel[:, h] + bias('v_bias', (heads, head_dim))[h]
        if mixer.qk_norm:
            k = norm(k, layer['k_norm'], eps)
        if mixer.rope:
            k = np.stack([rotate(k[t], t, mixer.rope) for t in range(length)])
        for j in range(queries):
            q = x @ q_kernel[:, h, j] + bias('q_bias', (heads, queries, head_dim))[h, j]
            if mixer.qk_norm:
                q = norm(q, layer['q_norm'], eps)
            for t in range(length):
                query = rotate(q[t], t, mixer.rope) if mixer.rope else q[t]
                weights = softmax(k[: t + 1] @ query / np.sqrt(head_dim))
                y[t] += (weights @ v[: t + 1]) @ o_kernel[h, j]
    return y + (layer['o_bias'] if mixer.output_bias else 0.0)


def convolve(u, kernel, bias, past=None):
    """Causal depthwise convolution [T, C] of one document, one output at a time."""
    taps = len(kernel)
    history = np.concatenate([np.zeros((taps - 1, *u.shape[1:])) if past is None else past, u])
    return np.stack([sum(kernel[j] * history[t + j] for j in range(taps)) for t in range(len(u))]) + bias


def recurrence(x, dt, a, b, c, state):
    """(y [T, P], state [P, N]) of one Mamba-2 head: state = exp(dt a) state + dt x ⊗ b, y = state c."""
    y = np.empty(x.shape)
    for t in range(len(x)):
        state = np.exp(dt[t] * a) * state + dt[t] * np.outer(x[t], b[t])
        y[t] = state @ c[t]
    return y, state


def mamba(layer, x, mixer, eps):
    length, embed = x.shape
    per_group = mixer.heads // mixer.groups
    y = np.zeros((length, embed))
    bias = lambda name: layer[name] if mixer.conv_bias else np.zeros(layer[name.removesuffix('_bias')].shape[1:])
    for g in range(mixer.groups):
        b = silu(convolve(x @ layer['b'][:, g], layer['conv_b'][:, g], bias('conv_b_bias')[g]))
        c = silu(convolve(x @ layer['c'][:, g], layer['conv_c'][:, g], bias('conv_c_bias')[g]))
        gated = np.zeros((length, per_group, mixer.head_dim))
        for m in range(per_group):
            u = silu(convolve(x @ layer['x'][:, g, m], layer['conv_x'][:, g, m], bias('conv_x_bias')[g, m]))
            dt = np.log1p(np.exp(x @ layer['dt'][:, g, m] + layer['dt_bias'][g, m]))
            dt = np.minimum(np.maximum(dt, mixer.dt_min), mixer.dt_max)
            a = -np.exp(layer['a_log'][g, m])
            out, _ = recurrence(u, dt, a, b, c, np.zeros((mixer.head_dim, mixer.state)))
            gated[:, m] = (out + layer['d'][g, m] * u) * silu(x @ layer['z'][:, g, m])
        normed = norm(gated.reshape(length, -1), layer['gated_norm'][g].reshape(-1), eps)
        y += normed @ layer['out'][g].reshape(-1, embed)
    return y


def choose(scores, choice, mixer):
    """(experts of one token, their weights)."""
    per_group = len(scores) // mixer.groups
    if mixer.groups > 1:
        best_two = [sorted(choice[g * per_group : (g + 1) * per_group])[-2:] for g in range(mixer.groups)]
        allowed = sorted(range(mixer.groups), key=lambda g: -sum(best_two[g]))[: mixer.top_groups]
        candidates = [e for e in range(len(scores)) if e // per_group in allowed]
    else:
        candidates = range(len(scores))
    chosen = sorted(candidates, key=lambda e: -choice[e])[: mixer.top_k]
    weights = scores[chosen]
    if mixer.normalize:
        weights = weights / weights.sum()
    return chosen, weights * mixer.scale


def moe(layer, x, mixer):
    """(y [T, D], experts of every token)."""
    layer = {name: np.asarray(leaf, np.float64) for name, leaf in layer.items()}
    merged = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in layer.items() if name.startswith('expert_')}
    logits = x @ layer['router'].reshape(len(layer['router']), -1)
    scores = sigmoid(logits) if mixer.scoring == 'sigmoid' else softmax(logits)
    bias = layer['correction_bias'].reshape(-1) if mixer.correction_bias else 0.0
    y, experts = np.zeros(x.shape), []
    gate = lambda e: (merged['expert_gate'][e].T, 0.0) if mixer.activation == 'swiglu' else None
    for t in range(len(x)):
        chosen, weights = choose(scores[t], scores[t] + bias, mixer)
        experts.append(chosen)
        for e, weight in zip(chosen, weights, strict=True):
            y[t] += weight * feed_forward(x[t], (merged['expert_up'][e].T, 0.0), gate(e), (merged['expert_down'][e], 0.0))
        if mixer.shared_width:
            up, down = layer['shared_up'].reshape(x.shape[1], -1), layer['shared_down'].reshape(-1, x.shape[1])
            shared_gate = (layer['shared_gate'].reshape(x.shape[1], -1), 0.0) if mixer.activation == 'swiglu' else None
            y[t] += feed_forward(x[t], (up, 0.0), shared_gate, (down, 0.0))
    return y, np.asarray(experts)
