"""Prefill and decoding against transformers on the same weights, against the memory's bandwidth, and of the smaller sizes.

  python experiments/bench/decode.py                five minutes on two cores; --models dense_22m,moe_30m for a part

Claims: at least 1.5 x transformers' prefill; decoding at least 3 x up to 30 M parameters and 1.7 x for a dense model of 80-100 M;
at batch 1 at least 60 % of the bandwidth that a copy has in the same run. Random float32 weights are exported once and read by
both sides, which run in turn on the same threads; medians. Bytes moved by a step: active weights and the cache it reads, once.
Prefill has a limit as well, the speed of a large matmul: what share of it either side has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE, Rope
from elastic_jax.cost import active_parameters, flops_per_token, kv_bytes, parameters, ssm_bytes
from elastic_jax.hf.export import export_folder
from elastic_jax.infer.decoding import Decoding, requests_of
from elastic_jax.infer.resident import Resident, Weights
from elastic_jax.infer.sampling import Sampling
from elastic_jax.model.params import leaves, map_table, param_table

VOCAB, PROMPT, NEW, ROUNDS = 8192, 256, 32, 5
ROTARY = Attention(kv_heads=4, query_heads=2, head_dim=64, rope=Rope())


def dense(embed: int, layers: int) -> Arch:
    return Arch.from_pattern(
        '*-' * layers, vocab=VOCAB, embed=embed, attention=ROTARY, mlp=MLP(4 * embed, 'swiglu'), tied=True, unit_blocks=2
    )


MODELS = {
    'hybrid_20m': Arch.from_pattern(
        'M-M-M*-M-M-M*-', vocab=VOCAB, embed=384, mamba=Mamba(heads=16, head_dim=48, groups=2, state=64),
        attention=Attention(kv_heads=2, query_heads=4, head_dim=48), mlp=MLP(1536),
    ),
    'dense_22m': dense(384, 8),
    'moe_30m': Arch.from_pattern(
        '*E' * 6, vocab=VOCAB, embed=384, attention=Attention(4, 2, 48, rope=Rope(), qk_norm=True), unit_blocks=2,
        moe=MoE(experts=16, expert_width=192, top_k=2, activation='swiglu', scoring='softmax', correction_bias=False),
    ),
    'dense_89m': dense(768, 10),
}  # fmt: skip
NARROW = {'mid': 0.75, 'small': 0.5}


def export(arch: Arch, folder: Path) -> dict[str, Any]:
    """Writes random weights for transformers, and returns them."""
    rng = np.random.default_rng(0)
    table = param_table(arch)
    params = map_table(lambda param: (0.02 * rng.standard_normal(param.shape)).astype(np.float32), table)
    for group, name, _ in leaves(table):
        if 'norm' in name:
            params[group][name] = np.ones_like(params[group][name])
    export_folder(folder, arch, lambda group, name, index: params[group][name][index], dtype='float32', eos_token_id=0)
    return params


def ours(weights: Weights, prompts: np.ndarray) -> tuple[float, float]:
    """(seconds of prefill, of a decoding step)."""
    rows = len(prompts)
    decoding = Decoding(weights, requests_of([Sampling()] * rows, [0] * rows), PROMPT + NEW, [NEW] * rows)
    begun = time.perf_counter()
    decoding.feed(prompts.tolist())
    jax.block_until_ready(decoding.state.logits_BxV)
    fed = time.perf_counter()
    drawn = 0
    while drawn < NEW:
        drawn += len(decoding.piece()[0])
    return fed - begun, (time.perf_counter() - fed) / NEW


def theirs(model: Any, prompts: np.ndarray) -> tuple[float, float]:
    """The same of transformers, by its own loop."""
    tokens = torch.from_numpy(prompts)

    def run(count: int) -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
        return time.perf_counter() - begun

    prefill = run(1)
    return prefill, (run(1 + NEW) - prefill) / NEW


def bandwidth(copied: int = 2**28) -> float:
    """Bytes per second that a copy reads and writes, on the threads of both sides; where memory lies decides as well."""
    seconds = []
    for _ in range(4):
        source, target = torch.ones(copied // 4), torch.empty(copied // 4)
        for _ in range(5):
            begun = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - begun)
    return 2 * copied / min(seconds)


def matmul_speed(size: int = 2048) -> float:
    """FLOPs per second of a large matmul, on the threads of both sides."""
    x = torch.ones(size, size)
    seconds = []
    for _ in range(7):
        begun = time.perf_counter()
        torch.matmul(x, x)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def prefill_flops(arch: Arch, rows: int) -> float:
    """What the mathematics of a prompt needs: only its last token is unembedded."""
    return float(rows * (PROMPT * (flops_per_token(arch, PROMPT) - 2 * arch.vocab * arch.embed) + 2 * arch.vocab * arch.embed))


def bytes_moved(arch: Arch, rows: int) -> float:
    """Bytes that a decoding step must read at least, halfway through the new tokens; a state is written as well."""
    cache = kv_bytes(arch, PROMPT + NEW // 2, 4) + 2 * ssm_bytes(arch, 4)
    embedding = 0 if arch.tied else arch.vocab * arch.embed  # looked up, not read
    return float(4 * (active_parameters(arch) - embedding) + rows * cache)


def in_turn(runs: dict[str, Callable[[], tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Median (prefill, step) seconds of every side: each once to warm up, then all in turn."""
    for run in runs.values():
        run()
    found = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(run())
    return {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in found.items()}


def narrowed(arch: Arch, share: float) -> Arch:
    """A size with `share` of the embedding and of every width inside the blocks."""
    of = lambda width: int(width * share)
    axes = {axis.name for axis in arch.axes()}
    widths = {'embed': of(arch.embed)}
    for mixer in arch.mixers:
        if isinstance(mixer, MLP):
            widths['mlp'] = of(mixer.width)
        if isinstance(mixer, Mamba):
            widths['mamba_heads'] = of(mixer.heads)
        if isinstance(mixer, MoE):
            widths['expert_width'] = of(mixer.expert_width)
    return arch.narrow({name: width for name, width in widths.items() if name in axes})


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One model's numbers at batch 1 and 8."""
    arch = MODELS[name]
    params = export(arch, folder / name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    resident = Resident(jax.tree.map(jnp.asarray, params), arch)
    sizes = {'full': arch, **{budget: narrowed(arch, share) for budget, share in NARROW.items()}}
    result: dict[str, Any] = {'parameters': float(parameters(arch)), 'active': float(active_parameters(arch))}
    for rows in (1, 8):
        prompts = np.random.default_rng(1).integers(1, VOCAB, (rows, PROMPT))
        ours_of = lambda own, prompts: ours(resident.weights(own), prompts)
        runs = {budget: partial(ours_of, own, prompts) for budget, own in sizes.items()}
        found = in_turn({'transformers': partial(theirs, model, prompts), **runs})
        limit, peak = bandwidth(), matmul_speed()
        (peer_prefill, peer_step), (prefill, step) = found['transformers'], found['full']
        result[f'batch_{rows}'] = {
            'prefill_tokens_per_s': rows * PROMPT / prefill,
            'prefill_times_transformers': peer_prefill / prefill,
            'matmul_gflops': peak / 1e9,
            'prefill_share_of_matmul': prefill_flops(arch, rows) / prefill / peak,
            'transformers_share_of_matmul': prefill_flops(arch, rows) / peer_prefill / peak,
            'decode_tokens_per_s': rows / step,
            'decode_times_transformers': peer_step / step,
            'copy_gb_per_s': limit / 1e9,
            'share_of_copy': bytes_moved(arch, rows) / step / limit,
            **{
                f'{budget}_over_full': {
                    'time': found[budget][1] / step, 'bytes': bytes_moved(own, rows) / bytes_moved(arch, rows)
                }
                for budget, own in sizes.items() if budget != 'full'
            },
        }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', default=','.join(MODELS))
    parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models.split(','):
            print(json.dumps({name: measure(name, Path(folder)), 'load': os.getloadavg()[0]}, indent=1), flush=True)


if __name__ == '__main__':
    main()
