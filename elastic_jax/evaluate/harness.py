"""Any size of a checkpoint for lm-evaluation-harness (extra `[eval]`).

  from elastic_jax.evaluate.harness import ElasticLM
  lm_eval.simple_evaluate(ElasticLM('runs/quickstart', budget='small'), tasks=['my_task'], task_manager=...)

or, once this module is imported, `model='elastic_jax'` with model_args='checkpoint=runs/quickstart,budget=small'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_jax.api import open_checkpoint
from elastic_jax.arch import parse_widths
from elastic_jax.errors import UserError
from elastic_jax.evaluate.likelihood import likelihoods
from elastic_jax.infer.generate import generate
from elastic_jax.infer.sampling import Sampling

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise UserError("the harness needs lm-evaluation-harness: pip install 'elastic_jax[eval]'") from error


@register_model('elastic_jax')
class ElasticLM(LM):
    """One size as a model of the harness.

    Args:
      checkpoint: a workdir or a step of one. budget: one of its budgets; or `widths`, such as 'embed=96;mlp=256' (semicolons, as
        the harness splits its arguments at commas); default: the largest budget.
    """

    def __init__(self, checkpoint: str, budget: str | None = None, widths: str | None = None, **unused: Any):
        super().__init__()
        opened = open_checkpoint(checkpoint)
        own = parse_widths(widths.replace(';', ',')) if widths else None
        self.model = opened.load(budget if budget or own else opened.largest, widths=own)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(Σ log p, whether it is the greedy continuation) of every (context, continuation)."""
        found = likelihoods(self.model.weights, self.model.tokenizer, [request.args for request in requests])
        return [(one.log_p, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Σ log p of whole texts."""
        found = likelihoods(self.model.weights, self.model.tokenizer, [('', request.args[0]) for request in requests])
        return [one.log_p for one in found]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The continuation of every context up to one of its stop strings.

        Each is drawn with its number as the seed: the same at every run, and another one where a request is repeated.
        """
        texts = []
        for number, request in enumerate(requests):
            context, options = request.args
            stop = options.get('until') or ()
            stop = [stop] if isinstance(stop, str) else [text for text in stop if text]
            limit = int(options.get('max_gen_toks') or 256)
            (done,) = generate(self.model.weights, self.model.tokenizer, [context], limit, _sampling(options), stop, seeds=number)
            texts.append(done.text)
        return texts


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """As transformers reads them: greedy unless `do_sample`, whose temperature is 1 where none is given."""
    if not options.get('do_sample'):
        return Sampling()
    heat, top_k, top_p = (options.get(name) for name in ('temperature', 'top_k', 'top_p'))
    return Sampling(1.0 if heat is None else float(heat), max(int(top_k or 0), 0), 1.0 if top_p is None else float(top_p))
