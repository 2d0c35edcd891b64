"""The manifest: the JSON item that says what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from elastic_jax.arch import Arch
from elastic_jax.errors import UserError
from elastic_jax.layout import Layout

FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Budget:
    """A named submodel: its Arch, its costs (`cost.Cost`), and its latest held-out metrics."""

    arch: Arch
    costs: Mapping[str, Any]
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its arrays.

    Attributes:
      arch, layout: the parent's. budgets: name -> Budget, largest first.
      step, stage, stage_step: the next step, and its place in the curriculum. rng: seeds of the run.
      dtypes: of parameters and compute. tokenizer: its spec. hf_config: config.json of the imported parent, or None.
      data_fingerprint, ordering_hash: of the corpus and of the permutations. experiment: its name. extra: anything else.
    """

    arch: Arch
    layout: Layout
    budgets: Mapping[str, Budget]
    step: int
    stage: str
    stage_step: int
    rng: list[int]
    dtypes: Mapping[str, str]
    tokenizer: Mapping[str, Any]
    hf_config: Mapping[str, Any] | None
    data_fingerprint: str
    ordering_hash: str
    experiment: str
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object, with a digest of itself that shows later edits."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain['arch'], plain['layout'] = self.arch.to_json(), self.layout.to_json()
        plain['budgets'] = {
            name: {'arch': budget.arch.to_json(), 'costs': dict(budget.costs), 'metrics': dict(budget.metrics)}
            for name, budget in self.budgets.items()
        }
        # Orbax's JSON item sorts keys; the order of the budgets matters here.
        plain['budget_order'] = list(self.budgets)
        plain = json.loads(json.dumps(plain))
        return {'format_version': FORMAT_VERSION, **plain, 'digest': _digest(plain)}

    @classmethod
    def from_json(cls, data: Any, where: str) -> Manifest:
        """The manifest that `to_json` wrote. Raises UserError when it is of a later format, damaged or edited."""
        if not isinstance(data, Mapping):
            raise UserError(f'{where} holds {str(data)[:40]}, not an object; restore it, or use another checkpoint')
        data = dict(data)
        version, digest = data.pop('format_version', None), data.pop('digest', None)
        if version != FORMAT_VERSION:
            todo = 'write it again' if isinstance(version, int) and version < FORMAT_VERSION else 'update elastic_jax'
            raise UserError(f'{where} has format version {version}, this program reads {FORMAT_VERSION}; {todo}')
        if digest != _digest(data):
            raise UserError(f'{where} was edited or damaged (its digest does not match); restore it, or use another checkpoint')
        try:
            order = data.pop('budget_order')
            budgets = {name: data['budgets'][name] for name in order}
            data['budgets'] = {
                name: Budget(Arch.from_json(entry['arch']), entry['costs'], entry['metrics']) for name, entry in budgets.items()
            }
            data['arch'], data['layout'] = Arch.from_json(data['arch']), Layout(**data['layout'])
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise UserError(f'{where} lacks or has unknown entries ({error}); restore it, or use another checkpoint') from error


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
