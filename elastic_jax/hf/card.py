"""The model card of an exported slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_jax.arch import Arch
from elastic_jax.cost import active_parameters, parameters
from elastic_jax.hf.hub import MODEL_ID


def model_card(arch: Arch, model_type: str, dtype: str, card: Mapping[str, Any]) -> str:
    """README.md: what the slice was cut from, its widths, its size, and how it measured.

    `card` may hold `parent` (name or hub id), `budget`, `metrics` (name -> value), `step`, `license`; the rest is derived.
    """
    front = {'library_name': 'transformers', 'pipeline_tag': 'text-generation', 'tags': '[elastic, nested]'}
    parent = card.get('parent') or ''
    if '/' in parent and MODEL_ID.fullmatch(parent):  # without one it is a folder's name
        front['base_model'] = parent
    if card.get('license'):
        front['license'] = card['license']
    budget = card.get('budget')
    facts = {
        'parent': parent or 'trained from scratch',
        'budget': budget or 'widths given by hand',
        'step': card.get('step'),
        'parameters': f'{parameters(arch):,.0f}',
        'active parameters': f'{active_parameters(arch):,.0f}',
        'pattern': f'`{arch.pattern}`',
        'dtype': dtype,
        'format': f'transformers `{model_type}`',
    }
    sections = [
        '---\n' + '\n'.join(f'{key}: {value}' for key, value in front.items()) + '\n---',
        f'# {parent or "Elastic model"}, {budget or "custom"} slice',
        'This model is one slice of an elastic checkpoint of elastic_jax: the leading units of every axis of its parent, cut '
        'out with no further training. In the pattern, `M` is Mamba-2, `*` attention, `-` an MLP, `E` a mixture of experts, and '
        '`.` a dropped block.',
        _table(('', ''), {key: value for key, value in facts.items() if value is not None}),
        '## Widths',
        _table(('axis', 'width'), arch.widths()),
    ]
    if card.get('metrics'):
        sections += ['## Held-out metrics', _table(('metric', 'value'), card['metrics'])]
    sections += [
        '## Use',
        '```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("PATH")\n```',
    ]
    return '\n\n'.join(sections) + '\n'


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    show = lambda value: f'{value:.6g}' if isinstance(value, float) else str(value)
    lines = [f'| {head[0]} | {head[1]} |', '|---|---|'] + [f'| {key} | {show(value)} |' for key, value in rows.items()]
    return '\n'.join(lines)
