"""No example rots: every fenced block of the README and the guides runs or parses, as do the examples of help and experiments."""

import re
import shlex
from pathlib import Path
from textwrap import indent

import pytest

from elastic_jax import api
from elastic_jax.cli import PATH_THROUGH, VERBS, parse

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for pattern in ('*.md', '*/README.md', 'experiments/*/README.md') for page in ROOT.glob(pattern))
EXPERIMENTS = sorted((ROOT / 'experiments').rglob('*.py'))
# The quickstart's numbers, for the tiny run that stands in for it.
TINY = {"{'embed': 96, 'mlp': 192}": "{'embed': 8, 'mlp': 16}", 'max_tokens=60': 'max_tokens=4'}


def blocks(page, language):
    """(line number, text) of every fenced block of a language."""
    text = page.read_text()
    for match in re.finditer(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL):
        yield text[: match.start()].count('\n') + 1, match[1]


def cases(language):
    return [pytest.param(text, id=f'{page.relative_to(ROOT)}:{line}') for page in PAGES for line, text in blocks(page, language)]


def commands(text):
    """The words of every simple command in a block of bash."""
    for line in text.replace('\\\n', ' ').splitlines():
        for part in re.split(r'&&|\|', line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r'\w+=\S*', words[0]):
                words.pop(0)
            if words:
                yield words


def check(words):
    """Whether a command is one that this project knows, with flags that it has and files that exist."""
    if words[:3] == ['python', '-m', 'elastic_jax'] or Path(words[0]).name == 'elastic':
        argv = words[words.index('elastic_jax') + 1 :] if 'elastic_jax' in words else words[1:]
        arguments = parse(argv)
        config = getattr(arguments, 'config', None)
        assert config is None or (ROOT / config.partition(':')[0]).is_file(), config
        return True
    if Path(words[0]).name.startswith('python') and len(words) > 1 and words[1].endswith('.py'):
        assert (ROOT / words[1]).is_file(), words[1]
        return True
    if words[0].startswith('launch/'):
        assert (ROOT / words[0]).is_file(), words[0]
        return True
    return False


def shown(text):
    """The words of the indented lines that begin with a command; what stands after two spaces explains it."""
    for line in text.replace('\\\n', ' ').splitlines():
        if re.match(r'\s+(elastic|python) \S', line):
            verb, _, rest = line.strip().partition(' --')
            # Two spaces end a command, but for those that align its first flag.
            command = verb + ' --' + re.split(r'\s{2,}', rest)[0] if rest else re.split(r'\s{2,}', verb)[0]
            yield shlex.split(command, comments=True)


@pytest.mark.parametrize('text', cases('bash'))
def test_bash_blocks_have_only_flags_and_files_that_exist(text):
    known = [check(words) for words in commands(text)]
    assert any(known) or 'pip install' in text, f'nothing of this project in: {text}'


@pytest.mark.parametrize('text', [*cases('python'), pytest.param(api.__doc__.partition('\n\n')[2], id='api.py')])
def test_python_blocks_run(text, finished_run, tmp_path, monkeypatch):
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs' / 'quickstart').symlink_to(finished_run)
    monkeypatch.chdir(tmp_path)
    for real, tiny in TINY.items():
        text = text.replace(real, tiny)
    exec(compile(text, '<snippet>', 'exec'), {'__name__': 'snippet'})


def first_lines(path):
    return path.read_text().partition('"""')[2].partition('"""')[0]


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_that_experiments_name_parse(path):
    for words in shown(first_lines(path)):
        assert check(words), words


def test_the_examples_of_help_parse():
    examples = [
        words for text in (PATH_THROUGH, *(verb.EXAMPLE for verb in VERBS.values())) for words in shown(indent(text, '  '))
    ]
    assert len(examples) >= 2 * len(VERBS) - 1
    for words in examples:
        if 'VERB' not in words:
            assert check(words), words
    assert {words[1] for words in shown(PATH_THROUGH)} >= set(VERBS), 'a verb is missing from the path'


def test_every_experiment_is_listed_in_its_guide():
    for path in (*EXPERIMENTS, *sorted((ROOT / 'experiments').rglob('*.ipynb'))):
        guide = next(folder / 'README.md' for folder in path.parents if (folder / 'README.md').is_file())
        assert str(path.relative_to(guide.parent)) in guide.read_text(), f'{path} is not in {guide}'


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', page.read_text()) + re.findall(r'src="([^"]+)"', page.read_text()):
            assert (page.parent / target).exists(), f'{page}: {target}'
