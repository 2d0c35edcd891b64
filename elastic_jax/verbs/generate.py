"""elastic generate: text from one size, from one that another drafts for, or from one that thinks and another that answers."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from elastic_jax.errors import UserError
from elastic_jax.terminal import json_text
from elastic_jax.verbs import flags

SUMMARY = 'Continue a prompt: with one size, or with one that thinks and another that answers.'
EXAMPLE = """elastic generate --checkpoint runs/quickstart --prompt "import " --budget small
  elastic generate --checkpoint runs/quickstart --prompt "2+3=" --think small --answer full --thinking-tokens 64"""


# What --think alone gives a meaning to; the defaults are those of `Control`.
CONTROL = ('thinking_tokens', 'opening', 'closing', 'switch', 'fill', 'entropy')


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.checkpoint(parser)
    parser.add_argument('--prompt', required=True)
    parser.add_argument('--budget', help='which size (default: the largest)')
    parser.add_argument('--max-tokens', type=int, default=128, help='of the text, or of the answer')
    parser.add_argument('--temperature', type=float, default=0.0, help='0 is greedy')
    parser.add_argument('--top-k', type=int, default=0, help='0: all')
    parser.add_argument('--top-p', type=float, default=1.0)
    parser.add_argument('--repetition-penalty', type=float, default=1.0, help='above 1 makes tokens less likely that came before')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--stop', action='append', default=[], metavar='TEXT', help='end before this text; may be given again')
    parser.add_argument('--slice-bytes', type=int, metavar='N', help='limit of slices kept beside the largest size')
    flags.json(parser)
    speculation = parser.add_argument_group('self-speculative decoding: the same text, in fewer passes of the larger size')
    speculation.add_argument('--draft', metavar='BUDGET', help='the smaller size that drafts for --budget')
    speculation.add_argument('--drafts', type=int, help='tokens drafted in a round (default: 4)')
    speculation.add_argument(
        '--compare', action='store_true', help='decode without drafts too, and say how much faster drafts are'
    )
    control = parser.add_argument_group('budget control')
    control.add_argument('--think', metavar='BUDGET', help='the size that thinks')
    control.add_argument('--answer', metavar='BUDGET', help='the size that answers')
    control.add_argument('--thinking-tokens', type=int, help='after so many the thinking is closed (default: 256)')
    control.add_argument('--opening', metavar='TEXT', help='put after the prompt (default: <think>)')
    control.add_argument('--closing', metavar='TEXT', help='ends the thinking (default: </think>)')
    control.add_argument(
        '--switch',
        choices=('recompute', 'hand-over', 'both'),
        help='how the answering size gets at the thoughts: by prefilling them anew (exact), from the cache of the thinking size '
        '(cheaper, approximate), or both ways, to compare them (default: recompute)',
    )
    control.add_argument('--fill', choices=('zero', 'mean'), help='handed over, what missing heads start with (default: zero)')
    control.add_argument(
        '--entropy', type=float, metavar='NATS', help='the answering size takes over before a token less certain than this'
    )


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint
    from elastic_jax.infer.sampling import Sampling

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.repetition_penalty)
    if bool(arguments.think) != bool(arguments.answer):
        raise UserError('--think and --answer go together: name the budget that thinks and the one that answers')
    if arguments.compare and not arguments.draft:
        raise UserError('--compare sets drafts against plain decoding; name the size that drafts with --draft')
    if arguments.drafts is not None and not arguments.draft:
        raise UserError('--drafts counts the tokens that a smaller size drafts; name that size with --draft')
    if given := [_flag(name) for name in CONTROL if getattr(arguments, name) is not None and not arguments.think]:
        raise UserError(f'{", ".join(given)}: nobody thinks; name the sizes with --think and --answer')
    if arguments.think and (arguments.budget or arguments.draft):
        raise UserError('--think and --answer name the sizes; leave out --budget and --draft')
    result, shown = (_think if arguments.think else _continue)(arguments, open_checkpoint(arguments.checkpoint), sampling)
    print(json_text({'prompt': arguments.prompt, **result}) if arguments.json else shown)
    return 0


def _flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def _continue(arguments: argparse.Namespace, checkpoint: Any, sampling: Any) -> tuple[dict[str, Any], str]:
    """(what --json prints, what is shown) of a prompt that one size continues, perhaps with another's drafts."""
    from elastic_jax.infer.clock import Clock

    budget = arguments.budget or checkpoint.largest
    sizes = checkpoint.load_sizes(list(filter(None, (budget, arguments.draft))), limit_bytes=arguments.slice_bytes)
    options = {
        'max_tokens': arguments.max_tokens,
        'sampling': sampling,
        'stop': arguments.stop,
        'seeds': arguments.seed,
    }
    prompts, result = [arguments.prompt], {}
    if arguments.draft:
        own = {} if arguments.drafts is None else {'drafts': arguments.drafts}
        speculate = lambda: sizes.speculate(prompts, budget, arguments.draft, **own, **options)
        if arguments.compare:
            speculate()  # the times of two ways compare once both have run before
        clock = Clock()
        (done,), tally = speculate()
        seconds, said = clock.seconds(), f'{tally.acceptance:.0%} of {tally.drafted} drafts kept'
        result['speculation'] = tally.to_json()
        if arguments.compare:
            sizes.generate(prompts, budget, **options)
            clock = Clock()
            (plain,) = sizes.generate(prompts, budget, **options)
            # Sampled texts differ in length: what compares is the time of a token.
            faster = (clock.seconds() / max(len(plain.tokens), 1)) / (seconds / max(len(done.tokens), 1))
            result['speculation'] |= {'plain_text': plain.text, 'speed_over_plain': faster}
            said += f'; {faster:.2f} x the tokens per second of plain decoding'
        print(said, file=sys.stderr)
    else:
        clock = Clock()
        (done,) = sizes.generate(prompts, budget, **options)
        seconds = clock.seconds()
    text = {'text': done.text, 'finish': done.finish, 'tokens': len(done.tokens), 'seconds': seconds}
    return {**text, **result, 'memory': sizes.memory()}, done.text


def _think(arguments: argparse.Namespace, checkpoint: Any, sampling: Any) -> tuple[dict[str, Any], str]:
    """(what --json prints, what is shown) of a prompt that one size thinks about and another answers."""
    from elastic_jax.infer.budget_control import SWITCHES, Control, agreement

    sizes = checkpoint.load_sizes([arguments.think, arguments.answer], limit_bytes=arguments.slice_bytes)
    found = {}
    given = {name: getattr(arguments, name) for name in CONTROL if getattr(arguments, name) is not None}
    switches = SWITCHES if arguments.switch == 'both' else (given.get('switch', SWITCHES[0]),)
    control = Control(max_tokens=arguments.max_tokens, **given | {'switch': switches[0]})
    for switch in switches:
        pair = arguments.think, arguments.answer
        # The times of two ways compare once both have run before.
        for _ in range(2 if arguments.switch == 'both' else 1):
            own = dataclasses.replace(control, switch=switch)
            found[switch] = sizes.think([arguments.prompt], *pair, own, sampling, arguments.stop, arguments.seed)
    described = {}
    for switch, ((thought,), timing) in found.items():
        tokens = {'thinking': thought.thinking_tokens, 'continued': thought.continued_tokens}
        described[switch] = {
            'switch': switch,
            'thinking': thought.thinking,
            'text': thought.answer.text,
            'finish': thought.answer.finish,
            'tokens': tokens | {'answer': len(thought.answer.tokens)},
            'seconds': timing.to_json(),
        }
    first, *others = described.values()
    (thought,), _ = next(iter(found.values()))
    result = {**first, 'memory': sizes.memory()}
    if others:
        result |= {'other': others[0], 'agreement': agreement(*(thoughts for thoughts, _ in found.values()))}
        described_seconds = ', '.join(f'{switch} {timing.to_answer:.3f} s' for switch, (_, timing) in found.items())
        agree = f'{result["agreement"]:.0%} of the answer tokens agree'
        print(f'to the first token of the answer: {described_seconds}; {agree}', file=sys.stderr)
    return result, f'{control.opening}{thought.thinking}{control.closing}{thought.answer.text}'
