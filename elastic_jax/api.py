"""The face for Python and Colab: open a checkpoint, load any size of it, and use it.

import elastic_jax

ckpt = elastic_jax.open_checkpoint('runs/quickstart')
print(ckpt.budgets)
model = ckpt.load('small')
print(model.generate('import ', max_tokens=60))
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from elastic_jax.arch import Arch, unknown_name
from elastic_jax.checkpoint.lazy import LazyLeaf, save_lazily
from elastic_jax.checkpoint.leaf_reader import LeafReader
from elastic_jax.checkpoint.manifest import Budget, Manifest
from elastic_jax.checkpoint.restore import restore_slice
from elastic_jax.checkpoint.stored import read_manifest, step_directory, tokenizer_files, tokenizer_folder
from elastic_jax.cost import cost_of
from elastic_jax.data.config import complete
from elastic_jax.data.pipeline import Batch, default_data_config, heldout_batches
from elastic_jax.data.tokenizers import Tokenizer, load_tokenizer, token_ids
from elastic_jax.errors import UserError
from elastic_jax.evaluate.evaluators import scored_file
from elastic_jax.evaluate.nesting import draw_nesting
from elastic_jax.evaluate.perplexity import evaluate
from elastic_jax.evaluate.summary import format_widths, human, width_lines
from elastic_jax.evaluate.tasks import read_task, run_task
from elastic_jax.hf.from_checkpoint import export_checkpoint
from elastic_jax.infer.generate import GREEDY, generate, stream
from elastic_jax.infer.resident import Resident, Weights, weights_of
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.sizes import Sizes
from elastic_jax.layout import Layout
from elastic_jax.model.decoder import logits
from elastic_jax.model.params import leaves, map_table, param_dtype, param_table
from elastic_jax.parallel.sharding import param_shardings


class BudgetTable(Mapping[str, Budget]):
    """Budget name -> Budget; prints as a table in a terminal and in a notebook."""

    columns = ('budget', 'parameters', 'active', 'bf16', 'bits/byte', 'widths')

    def __init__(self, budgets: Mapping[str, Budget]):
        self._budgets = dict(budgets)

    def __getitem__(self, name: str) -> Budget:
        if name not in self._budgets:
            raise UserError(unknown_name('budget', name, list(self._budgets)))
        return self._budgets[name]

    def __contains__(self, name: object) -> bool:
        return name in self._budgets

    def __iter__(self) -> Iterator[str]:
        return iter(self._budgets)

    def __len__(self) -> int:
        return len(self._budgets)

    def rows(self) -> list[tuple[str, ...]]:
        result = []
        for name, budget in self._budgets.items():
            costs, bits = budget.costs, budget.metrics.get('bits_per_byte')
            sizes = (human(costs['parameters']), human(costs['active_parameters']), human(costs['bytes'], 'B'))
            result.append((name, *sizes, f'{bits:.4f}' if bits is not None else '', format_widths(budget.arch.widths())))
        return result

    def __repr__(self) -> str:
        lines = [line[:-1] for line in (self.columns, *self.rows())]
        name, *sizes = (max(map(len, column)) for column in zip(*lines, strict=True))
        pad = lambda first, *rest: '  '.join([first.ljust(name), *map(str.rjust, rest, sizes)]).rstrip()
        # The widths stand below the table, which so fits into 80 columns.
        widths = {budget: self[budget].arch.widths() for budget in self}
        return '\n'.join([*(pad(*line) for line in lines), '', width_lines(widths, name)])

    def _repr_html_(self) -> str:
        cells = lambda tag, line: ''.join(f'<{tag}>{html.escape(cell).replace(",", ",<wbr>")}</{tag}>' for cell in line)
        rows = ''.join(f'<tr>{cells("td", row)}</tr>' for row in self.rows())
        return f'<table><thead><tr>{cells("th", self.columns)}</tr></thead><tbody>{rows}</tbody></table>'


@dataclasses.dataclass
class Model:
    """One size, loaded: its Arch and its own parameters."""

    arch: Arch
    layout: Layout
    params: dict[str, Any]
    tokenizer: Tokenizer
    dtype: Any = jnp.float32

    @property
    def weights(self) -> Weights:
        """What the programs of `infer` run."""
        return weights_of(self.params, self.arch, self.layout, self.dtype)

    def logits(self, tokens_BxT: Any) -> jax.Array:
        """Logits [B, T, V] in float32."""
        return _logits(self.params, jnp.asarray(tokens_BxT), self.arch, jnp.dtype(self.dtype))

    def loss(self, tokens_BxT: Any) -> float:
        """Mean cross-entropy of each token given those before it, in nats."""
        tokens_BxT = jnp.asarray(tokens_BxT)
        log_q = jax.nn.log_softmax(self.logits(tokens_BxT)[:, :-1])
        return float(-jnp.take_along_axis(log_q, tokens_BxT[:, 1:, None], axis=-1).mean())

    def generate(
        self,
        prompt: str | Sequence[str],
        max_tokens: int = 128,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Sequence[str] = (),
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """The continuation of a prompt, or a list of them for a list of prompts.

        Args:
          sampling, seed: one for all prompts, or one for each; of a single seed the prompts take it and its successors.
          stop: strings before which a continuation ends.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        completions = generate(self.weights, self.tokenizer, prompts, max_tokens, sampling, stop, seed)
        texts = [completion.text for completion in completions]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(
        self,
        prompt: str,
        max_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """The continuation of one prompt, piece after piece as it is made; arguments as of `generate`."""
        shown = 0
        for (completion,) in stream(self.weights, self.tokenizer, [prompt], max_tokens, sampling, stop, seed):
            if len(completion.text) > shown:
                yield completion.text[shown:]
            shown = len(completion.text)

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Held-out scores over batches of `data.pipeline`."""
        return evaluate(self.params, self.arch, batches, dtype=self.dtype)


_logits = jax.jit(
    lambda params, tokens, arch, dtype: logits(params, tokens, arch, dtype=dtype), static_argnames=('arch', 'dtype')
)


class Checkpoint:
    """An elastic checkpoint: its manifest is read, its arrays only when a size is loaded."""

    def __init__(self, path: epath.PathLike):
        self.path = step_directory(path)
        self.manifest: Manifest = read_manifest(self.path)
        self.arch, self.layout = self.manifest.arch, self.manifest.layout
        self.budgets = BudgetTable(self.manifest.budgets)

    def __repr__(self) -> str:
        return f'{self.path}, step {self.manifest.step} ({self.manifest.stage})\n{self.budgets!r}'

    @property
    def largest(self) -> str:
        return next(iter(self.budgets))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        folder = tokenizer_folder(self.path, self.manifest)
        parents_own = token_ids((self.manifest.hf_config or {}).get('eos_token_id'))
        return load_tokenizer(os.fspath(folder) if folder else 'bytes', parents_own)

    def arch_of(self, budget: str | None = None, widths: Mapping[str, int] | None = None) -> Arch:
        """The Arch of a budget, or of any widths that nest and respect the layout; unnamed axes stay full."""
        if (budget is None) == (widths is None):
            raise UserError('name a budget or give widths, one of the two')
        if widths is not None:
            return self.layout_checked(self.arch.narrow(widths))
        return self.budgets[budget].arch

    def layout_checked(self, arch: Arch) -> Arch:
        self.layout.check(arch)
        return arch

    def load(
        self, budget: str | None = None, *, widths: Mapping[str, int] | None = None, mesh: Mesh | None = None, dtype: Any = None
    ) -> Model:
        """One size, reading only its own bytes.

        Args:
          budget: a budget of the checkpoint; or `widths`, such as {'embed': 96, 'mlp@3': 128}, trained or not.
          mesh: of `parallel.mesh`; every device reads its own part. dtype: of parameters and compute.
        """
        arch = self.arch_of(budget, widths)
        params = self._restore(arch, mesh, dtype)
        return Model(arch, self.layout, params, self.tokenizer, jnp.float32 if dtype is None else jnp.dtype(dtype))

    def load_sizes(
        self,
        budgets: Sequence[str] | None = None,
        *,
        widths: Sequence[Mapping[str, int]] = (),
        limit_bytes: int | None = None,
        mesh: Mesh | None = None,
        dtype: Any = None,
    ) -> Sizes:
        """Several budgets (default: all) from one set of parameters in memory, that of the largest of them.

        Args:
          widths: sizes by widths beside the budgets; their names are the widths as `--widths` takes them.
          limit_bytes: how much the slices of the others may take beside it; None: as much as they need.
          mesh, dtype: as of `load`, for the largest.
        """
        archs = {name: self.budgets[name].arch for name in (self.budgets if budgets is None else budgets)}
        archs |= {format_widths(own): self.arch_of(widths=own) for own in widths}
        holds_all = [arch for arch in archs.values() if all(other.nests_in(arch) for other in archs.values())]
        largest = holds_all[0] if holds_all else self.arch
        params, compute = self._restore(largest, mesh, dtype), jnp.float32 if dtype is None else dtype
        return Sizes(Resident(params, largest, self.layout, compute, limit_bytes), archs, self.tokenizer)

    def _restore(self, arch: Arch, mesh: Mesh | None, dtype: Any) -> dict[str, Any]:
        return restore_slice(self.path, arch, None if mesh is None else param_shardings(arch, self.layout, mesh), dtype)

    def slice(
        self, budget: str | None, out: epath.PathLike, *, widths: Mapping[str, int] | None = None, dtype: Any = None
    ) -> epath.Path:
        """Writes one size as an ordinary checkpoint whose only budget is `full`, leaf by leaf. Returns its path."""
        arch, out = self.arch_of(budget, widths), epath.Path(out).resolve()
        if out.exists():
            raise UserError(f'{out} exists already; give a folder that does not')
        tokenizer = tokenizer_files(self.path, self.manifest)
        read = LeafReader(self.path, arch)

        def lazy(group: str, name: str, param: Any) -> LazyLeaf:
            own = np.dtype(param_dtype(param, jnp.dtype(dtype))) if dtype else read.dtype(group, name)
            first = next((dim for dim, size in enumerate(param.shape) if size > 1), 0)
            return LazyLeaf(param.shape, own, lambda index: read(group, name, index, own), first)

        table = param_table(arch, self.layout)
        params: dict[str, dict[str, Any]] = map_table(lambda _: None, table)
        for group, name, param in leaves(table):
            params[group][name] = lazy(group, name, param)
        metrics = self.budgets[budget].metrics if budget else {}
        costs = cost_of(arch, next(iter(self.budgets.values())).costs.get('context', 4096)).to_json()
        manifest = dataclasses.replace(
            self.manifest,
            arch=arch,
            budgets={'full': Budget(arch, costs, metrics)},
            dtypes={**self.manifest.dtypes, **({'params': str(dtype)} if dtype else {})},
            extra={**self.manifest.extra, 'sliced_from': os.fspath(self.path), 'sliced_budget': budget or ''},
        )
        save_lazily(out, params, manifest, tokenizer)
        return out

    def export(
        self, budget: str | None, out: str | os.PathLike[str], *, widths: Mapping[str, int] | None = None, dtype: Any = None
    ) -> Any:
        """Writes one size as a Hugging Face folder for transformers and vLLM. Returns its path."""
        return export_checkpoint(
            self.path, self.arch_of(budget, widths), out, dtype=dtype and jnp.dtype(dtype).name, budget=budget
        )

    def heldout(
        self,
        data: str | None = None,
        context: int = 256,
        batch_size: int = 8,
        batches: int | None = None,
        **changes: Any,
    ) -> list[Batch]:
        """Held-out batches of the run's own data, or all of a text or JSONL file.

        Args:
          changes: keys of config.data that the file has otherwise than the run's own: field, loss, encoding, … (data/config.py).
        """
        config = default_data_config()
        own = self.path.parent.parent / 'config.json'
        if own.exists():
            config = complete(json.loads(own.read_text())['data'])
        elif data is None:
            raise UserError(f'{self.path} has no run beside it whose held-out data to use; give a file with --data')
        if data is not None:
            config = scored_file(config, data, changes)
        if self.manifest.tokenizer.get('kind') != 'bytes':
            config.tokenizer = self.tokenizer.spec['folder']
        return list(heldout_batches(config, batch_size, context, batches))

    def evaluate(
        self,
        budgets: Sequence[str] | None = None,
        *,
        widths: Sequence[Mapping[str, int]] = (),
        data: str | Sequence[str] | None = None,
        tasks: Sequence[str] = (),
        context: int = 256,
        batches: int | None = None,
        limit: int | None = None,
        **changes: Any,
    ) -> dict[str, dict[str, Any]]:
        """Scores of several budgets (default: all) and sizes by `widths`, all from one load.

        Args:
          data: one file, or several, whose scores then stand under `data` by file; None: the run's held-out data.
          tasks: JSONL files (evaluate/tasks.py), whose scores stand under `tasks` by name. limit: questions of each.
          context, batches: of the text, in batches of 8 rows. changes: as of `heldout`, for every file of `data`.
        """
        read = [read_task(path) for path in tasks]
        names = [task.name for task in read]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f'two tasks are named {twice}, each after its file; rename one of the files')
        texts = {
            name: self.heldout(name, context, batches=batches, **changes)
            for name in ([data] if isinstance(data, str | None) else data)
        }
        sizes, scores = self.load_sizes(budgets, widths=widths), {}
        for name in sizes.archs:
            weights = sizes.weights(name)
            by_text = {text: evaluate(weights.own(), weights.arch, scored) for text, scored in texts.items()}
            own: dict[str, Any] = dict(next(iter(by_text.values()), {}))
            if len(by_text) > 1:
                own['data'] = by_text
            if read:
                own['tasks'] = {task.name: run_task(weights, self.tokenizer, task, limit) for task in read}
            scores[name] = own
        return scores

    def draw(self, *, colour: bool = False, ascii_only: bool = False) -> str:
        """The nested widths of every block as text, 80 columns wide."""
        archs = {name: budget.arch for name, budget in self.budgets.items()}
        return draw_nesting(archs, self.arch, colour=colour, ascii_only=ascii_only)

    def describe(self) -> dict[str, Any]:
        """What `inspect --json` prints."""
        manifest = self.manifest
        budgets = [
            {'name': name, 'widths': budget.arch.widths(), **budget.costs, 'metrics': dict(budget.metrics)}
            for name, budget in self.budgets.items()
        ]
        return {
            'budgets': budgets,
            'path': os.fspath(self.path),
            'step': manifest.step,
            'stage': manifest.stage,
            'pattern': self.arch.pattern,
            'layout': self.layout.to_json(),
            'tokenizer': dict(manifest.tokenizer),
            'experiment': manifest.experiment,
        }


def open_checkpoint(path: epath.PathLike) -> Checkpoint:
    """Opens a workdir of `elastic train` or `elastic import`, or one step of it. Cheap: only the manifest is read."""
    return Checkpoint(path)
