"""The `elastic` command: one thin function per verb, over the same functions as `api.py`.

Exit status 0; 1 when the work failed; 2 for bad usage or input. Errors are one sentence on stderr; results go to stdout.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from elastic_jax.checkpoint.quiet import quiet_failures
from elastic_jax.errors import UserError, WorkError

PATH_THROUGH = """\
elastic: one parent language model in, one checkpoint with several nested models out.

The usual path:
  elastic data     --config experiments/quickstart.py                               what it will train on: samples, counts, speed
  elastic train    --config experiments/quickstart.py --workdir runs/quickstart    a parent, ranked, searched, trained elastically
  elastic inspect  --checkpoint runs/quickstart                                     what is inside: budgets, widths, costs
  elastic eval     --checkpoint runs/quickstart                                     how good every budget is
  elastic generate --checkpoint runs/quickstart --budget small --prompt 'def '      text from any size
  elastic slice    --checkpoint runs/quickstart --budget small --out out/small      one size as a checkpoint of its own
  elastic report   --workdir runs/quickstart                                        report.html and pareto.png
  elastic plan     --config experiments/quickstart.py --topology v5e:2x2            what it takes on TPUs, without one

`elastic VERB --help` says more about each.
"""


class _Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors that name the nearest flag."""

    def error(self, message: str) -> Any:
        raise UserError(f'{message} (see {self.prog} --help)')

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in _all_actions(self, argv) for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition('=')[0], flags, n=1)
            hint = f'; did you mean {near[0]}?' if near else ''
            self.error(f'unknown argument {unknown[0]!r}{hint}')
        return parsed


def _all_actions(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[argparse.Action]:
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return verbs.choices[argv[0]]._actions if argv and argv[0] in verbs.choices else parser._actions


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `elastic` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    quiet_failures()
    try:
        status = run(argv)
    except UserError as error:
        status = _fail(error, 2)
    except WorkError as error:
        status = _fail(error, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = _fail('interrupted', 130)
    sys.stdout.flush()
    sys.exit(status)


def _fail(error: object, status: int) -> int:
    print(f'elastic: {error}', file=sys.stderr)
    return status


def run(argv: list[str]) -> int:
    """Runs one command and returns its exit status."""
    if not argv:
        print(PATH_THROUGH, end='')
        return 0
    if argv[0] == 'train' and not {'-h', '--help'} & set(argv):
        return _train(argv[1:])
    overrides = [argument for argument in argv if argv[0] in ('data', 'plan') and argument.startswith('--config.')]
    arguments = _parser().parse_strictly([argument for argument in argv if argument not in overrides])
    arguments.overrides = overrides
    return arguments.run(arguments)


def _parser() -> _Parser:
    parser = _Parser(prog='elastic', description=PATH_THROUGH, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest='verb', metavar='VERB', required=True, parser_class=_Parser)

    def verb(name: str, summary: str, example: str, function: Any) -> argparse.ArgumentParser:
        own = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f'example:\n  {example}',
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(run=function)
        return own

    train = verb(
        'train',
        'Run or resume an experiment; the same command goes on where it stopped.',
        'elastic train --config experiments/quickstart.py --workdir runs/quickstart --config.stages.search.steps=100',
        None,
    )
    train.add_argument(
        '--config', required=True, metavar='FILE[:ARG]', help='file with get_config(arg); --config.key=value overrides'
    )
    train.add_argument('--workdir', required=True, help='where config, metrics, checkpoints and report go (any path, also gs://)')

    data = verb(
        'data',
        'Show what a config trains on: samples, counts of every source, damaged lines, how full rows are, tokens per second.',
        'elastic data --config experiments/quickstart.py --config.data.path="texts/*.jsonl" --stage long',
        _data,
    )
    data.add_argument(
        '--config', required=True, metavar='FILE[:ARG]', help='file with get_config(arg); --config.key=value overrides'
    )
    data.add_argument('--stage', help='only this stage of the curriculum (default: all, with samples of the first)')
    data.add_argument('--samples', type=int, default=2, help='rows to show (default: 2)')
    data.add_argument('--tokens', type=int, default=400, help='at most so many tokens of each row (default: 400)')
    data.add_argument('--seconds', type=float, default=1.0, help='how long speed is measured, for each stage (default: 1)')
    _json(data)

    plan = verb(
        'plan',
        'Compile a run for TPUs that are not here: memory, cycles, collectives, whether it fits, and what to change if not.',
        'elastic plan --config experiments/star_elastic_nano_v3.py:one_period --topology v5p:8x8x4 --programs short',
        _plan,
    )
    plan.add_argument(
        '--config', required=True, metavar='FILE[:ARG]', help='file with get_config(arg); --config.key=value overrides'
    )
    plan.add_argument('--topology', required=True, metavar='NAME', help='such as v5p:8x8x4: family and shape in chips')
    plan.add_argument(
        '--programs',
        metavar='NAMES',
        help='comma-separated (default: all): STAGE, STAGE/BUDGET (it alone), STAGE/masks, decode/BUDGET',
    )
    _json(plan)

    imported = verb(
        'import',
        'Turn a Hugging Face model into a checkpoint with the budget full, for config.parent.checkpoint.',
        'elastic import --hf nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 --checkpoint runs/parent',
        _import,
    )
    imported.add_argument('--hf', required=True, metavar='DIR_OR_ID', help='a folder with safetensors files, or an id of the hub')
    imported.add_argument('--checkpoint', required=True, metavar='DIR', help='a workdir that holds no checkpoints yet')

    inspect = verb('inspect', 'Show the budgets of a checkpoint.', 'elastic inspect --checkpoint runs/quickstart', _inspect)
    _checkpoint(inspect)
    _json(inspect)

    cut = verb(
        'slice',
        'Cut one size out of a checkpoint, reading only its bytes.',
        'elastic slice --checkpoint runs/quickstart --budget small --format hf --out out/small',
        _slice,
    )
    _checkpoint(cut)
    size = cut.add_mutually_exclusive_group(required=True)
    size.add_argument('--budget', help='a budget of the checkpoint')
    size.add_argument('--widths', help='any widths that nest, such as embed=96,mlp=256,mlp@3=128; others stay full')
    cut.add_argument('--out', required=True, help='a folder that does not exist yet')
    cut.add_argument('--format', choices=('orbax', 'hf'), default='orbax')
    cut.add_argument('--dtype', choices=('bfloat16', 'float32'), help='dtype of the weights (default: as stored)')
    cut.add_argument('--push-to-hub', metavar='ID', help='also upload the folder to this model id (with --format hf)')

    evaluate = verb(
        'eval', 'Held-out loss of every budget, in one load.', 'elastic eval --checkpoint runs/quickstart --data notes.txt', _eval
    )
    _checkpoint(evaluate)
    evaluate.add_argument('--budgets', help='comma-separated (default: all)')
    evaluate.add_argument('--data', help="a text or JSONL file (default: the run's own held-out data)")
    evaluate.add_argument('--context', type=int, default=256, help='tokens per sequence')
    evaluate.add_argument('--batches', type=int, default=32, help='at most this many batches of 8 sequences')
    _json(evaluate)

    generate = verb(
        'generate',
        'Continue a prompt: with one size, or with one that thinks and another that answers.',
        'elastic generate --checkpoint runs/quickstart --prompt "import " --budget small\n'
        '  elastic generate --checkpoint runs/quickstart --prompt "2+3=" --think small --answer full --thinking-tokens 64',
        _generate,
    )
    _checkpoint(generate)
    generate.add_argument('--prompt', required=True)
    generate.add_argument('--budget', help='which size (default: the largest)')
    generate.add_argument('--max-tokens', type=int, default=128, help='of the text, or of the answer')
    generate.add_argument('--temperature', type=float, default=0.0, help='0 is greedy')
    generate.add_argument('--top-k', type=int, default=0, help='0: all')
    generate.add_argument('--top-p', type=float, default=1.0)
    generate.add_argument(
        '--repetition-penalty', type=float, default=1.0, help='above 1 makes tokens less likely that came before'
    )
    generate.add_argument('--seed', type=int, default=0)
    generate.add_argument('--stop', action='append', default=[], metavar='TEXT', help='end before this text; may be given again')
    generate.add_argument('--slice-bytes', type=int, metavar='N', help='limit of slices kept beside the largest size')
    _json(generate)
    speculation = generate.add_argument_group('self-speculative decoding: the same text, in fewer passes of the larger size')
    speculation.add_argument('--draft', metavar='BUDGET', help='the smaller size that drafts for --budget')
    speculation.add_argument('--drafts', type=int, default=4, help='tokens drafted in a round (default: 4)')
    control = generate.add_argument_group('budget control')
    control.add_argument('--think', metavar='BUDGET', help='the size that thinks')
    control.add_argument('--answer', metavar='BUDGET', help='the size that answers')
    control.add_argument('--thinking-tokens', type=int, default=256, help='after so many the thinking is closed')
    control.add_argument('--opening', default='<think>', metavar='TEXT', help='put after the prompt (default: <think>)')
    control.add_argument('--closing', default='</think>', metavar='TEXT', help='ends the thinking (default: </think>)')
    control.add_argument(
        '--switch',
        choices=('recompute', 'hand-over', 'both'),
        default='recompute',
        help='how the answering size gets at the thoughts: by prefilling them anew (exact), from the cache of the thinking size '
        '(cheaper, approximate), or both ways, to compare them',
    )
    control.add_argument(
        '--fill', choices=('zero', 'mean'), default='zero', help='handed over, what missing heads start with (default: zero)'
    )
    control.add_argument(
        '--entropy', type=float, metavar='NATS', help='the answering size takes over before a token less certain than this'
    )

    report = verb('report', 'Write report.html and pareto.png.', 'elastic report --workdir runs/quickstart', _report)
    report.add_argument('--workdir', required=True)
    return parser


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--checkpoint', required=True, metavar='DIR', help='a workdir, or one step of it')


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of a table')


def _train(argv: list[str]) -> int:
    from elastic_jax.config_file import load_config
    from elastic_jax.train.loop import train
    from elastic_jax.train.signals import Stopped

    config, workdir = load_config(argv)
    try:
        train(config, workdir)
    except Stopped as stopped:
        print(f'elastic: {stopped}', file=sys.stderr)
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from elastic_jax.arch import unknown_name
    from elastic_jax.config_file import load_config
    from elastic_jax.data.show import describe, render
    from elastic_jax.train.stage_data import stages_data

    config, _ = load_config(['--config', arguments.config, *arguments.overrides], 'data')
    stages = stages_data(config)
    if arguments.stage:
        found = [stage for stage in stages if stage.name == arguments.stage]
        if not found:
            raise UserError(unknown_name('stage', arguments.stage, [stage.name for stage in stages]))
        stages = found
    described = describe(stages, max(arguments.samples, 0), arguments.tokens, arguments.seconds)
    print(json.dumps(described) if arguments.json else render(described, color=sys.stdout.isatty()))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from elastic_jax.config_file import load_config
    from elastic_jax.plan.planner import plan_run
    from elastic_jax.plan.table import show

    config, _ = load_config(['--config', arguments.config, *arguments.overrides], 'plan')
    only = arguments.programs.split(',') if arguments.programs else ()
    say = lambda line: print(line, file=sys.stderr, flush=True)
    planned = plan_run(config, arguments.topology, only, say)
    print(json.dumps(planned.to_json()) if arguments.json else show(planned))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from elastic_jax.cost import parameters
    from elastic_jax.hf.importing import import_checkpoint

    arch = import_checkpoint(arguments.hf, arguments.checkpoint)
    print(f'imported {parameters(arch):,.0f} parameters, {arch.pattern}, to {arguments.checkpoint}', file=sys.stderr)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint

    checkpoint = open_checkpoint(arguments.checkpoint)
    print(json.dumps(checkpoint.describe()) if arguments.json else checkpoint.budgets)
    return 0


def _slice(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint
    from elastic_jax.arch import parse_widths

    if arguments.push_to_hub and arguments.format != 'hf':
        raise UserError('--push-to-hub uploads a Hugging Face folder: add --format hf')
    checkpoint = open_checkpoint(arguments.checkpoint)
    widths = parse_widths(arguments.widths) if arguments.widths else None
    write = checkpoint.export if arguments.format == 'hf' else checkpoint.slice
    write(arguments.budget, arguments.out, widths=widths, dtype=arguments.dtype)
    print(f'wrote {arguments.out}', file=sys.stderr)
    if arguments.push_to_hub:
        from elastic_jax.hf.hub import push

        print(f'uploaded to {push(arguments.out, arguments.push_to_hub)}', file=sys.stderr)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint

    checkpoint = open_checkpoint(arguments.checkpoint)
    budgets = arguments.budgets.split(',') if arguments.budgets else None
    scores = checkpoint.evaluate(budgets, data=arguments.data, context=arguments.context, batches=arguments.batches)
    if arguments.json:
        print(json.dumps({'budgets': [{'name': name, **score} for name, score in scores.items()]}))
    else:
        for name, score in scores.items():
            print(f'{name:12s} {score["bits_per_byte"]:.4f} bits per byte  {score["loss"]:.4f} nats per token')
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint
    from elastic_jax.infer.sampling import Sampling

    checkpoint = open_checkpoint(arguments.checkpoint)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.repetition_penalty)
    if bool(arguments.think) != bool(arguments.answer):
        raise UserError('--think and --answer go together: name the budget that thinks and the one that answers')
    if arguments.think:
        if arguments.budget or arguments.draft:
            raise UserError('--think and --answer name the sizes; leave out --budget and --draft')
        result, shown = _think(arguments, checkpoint, sampling)
    else:
        result, shown = _continue(arguments, checkpoint, sampling)
    print(json.dumps({'prompt': arguments.prompt, **result}) if arguments.json else shown)
    return 0


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
    clock, speculation = Clock(), {}
    if arguments.draft:
        (done,), tally = sizes.speculate([arguments.prompt], budget, arguments.draft, arguments.drafts, **options)
        speculation = {'speculation': tally.to_json()}
        print(f'{tally.acceptance:.0%} of {tally.drafted} drafts kept', file=sys.stderr)
    else:
        (done,) = sizes.generate([arguments.prompt], budget, **options)
    result = {'text': done.text, 'finish': done.finish, 'tokens': len(done.tokens), 'seconds': clock.seconds()}
    return {**result, **speculation, 'memory': sizes.memory()}, done.text


def _think(arguments: argparse.Namespace, checkpoint: Any, sampling: Any) -> tuple[dict[str, Any], str]:
    """(what --json prints, what is shown) of a prompt that one size thinks about and another answers."""
    from elastic_jax.infer.budget_control import SWITCHES, Control, agreement

    sizes = checkpoint.load_sizes([arguments.think, arguments.answer], limit_bytes=arguments.slice_bytes)
    found = {}
    for switch in SWITCHES if arguments.switch == 'both' else (arguments.switch,):
        control = Control(
            thinking_tokens=arguments.thinking_tokens,
            max_tokens=arguments.max_tokens,
            opening=arguments.opening,
            closing=arguments.closing,
            switch=switch,
            fill=arguments.fill,
            entropy=arguments.entropy,
        )
        pair = arguments.think, arguments.answer
        # The times of two ways compare once both have run before.
        for _ in range(2 if arguments.switch == 'both' else 1):
            found[switch] = sizes.think([arguments.prompt], *pair, control, sampling, arguments.stop, arguments.seed)
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
    return result, f'{arguments.opening}{thought.thinking}{arguments.closing}{thought.answer.text}'


def _report(arguments: argparse.Namespace) -> int:
    from elastic_jax.evaluate.report import write_report

    print(write_report(arguments.workdir))
    return 0
