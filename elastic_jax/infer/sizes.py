"""Every size of a checkpoint from one set of parameters in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from elastic_jax.arch import Arch, unknown_name
from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError
from elastic_jax.infer.budget_control import Control, Thought, Timing, think_then_answer
from elastic_jax.infer.generate import GREEDY, generate
from elastic_jax.infer.resident import Resident, Weights
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.speculative import Tally, generate_speculative
from elastic_jax.infer.text import Completion


class Sizes:
    """Sizes by name, each ready to generate; which are in memory as slices of their own is `resident`'s business.

    `prompts` is a list everywhere; `sampling` and `seeds` are one for all prompts or one for each.
    """

    def __init__(self, resident: Resident, archs: Mapping[str, Arch], tokenizer: Tokenizer):
        self.resident, self.archs, self.tokenizer = resident, dict(archs), tokenizer

    def arch(self, budget: str) -> Arch:
        """The Arch of a size. Raises UserError for an unknown one."""
        if budget not in self.archs:
            raise UserError(unknown_name('budget', budget, list(self.archs)))
        return self.archs[budget]

    def weights(self, budget: str, beside: Collection[str] = ()) -> Weights:
        """What the programs of `infer` run for a size while those `beside` it are held. Raises UserError for an unknown one."""
        return self.resident.weights(self.arch(budget), [self.arch(name) for name in beside])

    def memory(self) -> dict[str, Any]:
        """Bytes of the resident parameters and of the slices kept beside them; see `Resident.report`."""
        return self.resident.report()

    def generate(
        self,
        prompts: Sequence[str],
        budget: str,
        max_tokens: int = 128,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Sequence[str] = (),
        seeds: Sequence[int] | int = 0,
    ) -> list[Completion]:
        """The continuations of all prompts by one size."""
        return generate(self.weights(budget), self.tokenizer, prompts, max_tokens, sampling, stop, seeds)

    def think(
        self,
        prompts: Sequence[str],
        think: str,
        answer: str,
        control: Control,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Sequence[str] = (),
        seeds: Sequence[int] | int = 0,
    ) -> tuple[list[Thought], Timing]:
        """One size thinks, another answers."""
        pair = self.weights(think), self.weights(answer, [think])
        return think_then_answer(*pair, self.tokenizer, prompts, control, sampling, stop, seeds)

    def speculate(
        self,
        prompts: Sequence[str],
        budget: str,
        draft: str,
        drafts: int = 4,
        max_tokens: int = 128,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Sequence[str] = (),
        seeds: Sequence[int] | int = 0,
    ) -> tuple[list[Completion], Tally]:
        """As `generate` with `budget`, whose tokens `draft` guesses ahead, `drafts` at a time."""
        pair = self.weights(budget), self.weights(draft, [budget])
        options = {'drafts': drafts, 'max_tokens': max_tokens, 'sampling': sampling, 'stop': stop, 'seeds': seeds}
        return generate_speculative(*pair, self.tokenizer, prompts, **options)
