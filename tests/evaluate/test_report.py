"""The report: one file that needs no network, holds every budget, works on unfinished runs and refuses what is no run."""

import json
import re
import struct
from html.parser import HTMLParser

import pytest

from elastic_jax.errors import UserError, WorkError
from elastic_jax.evaluate.report import write_report
from tests.evaluate.synthetic import ARCHS, PARTS, SCORES, STEPS, evaluated, write_frontier, write_run

VOID = {'meta', 'br', 'wbr', 'img', 'path', 'rect', 'link', 'input', 'hr'}


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that every tag that opens closes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.sections, self.text, self.data = [], [], [], {}, '', []
        self.feed(text)
        self.close()
        assert not self.open, f'never closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or '') for name, value in attrs]
        if tag == 'section':
            self.title = None
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or '') for name, value in attrs]

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag, f'{tag} closes nothing'

    def handle_data(self, data):
        if self.open and self.open[-1] == 'h2':
            self.title = data
            self.sections[data] = ''
        elif self.open and self.open[-1] == 'script':
            self.data.append(data)
        elif self.open and self.open[-1] != 'style':
            self.text += data + ' '
            if 'section' in self.open and self.title:
                self.sections[self.title] += data + ' '


def report(workdir):
    return Page(write_report(workdir).read_text())


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    workdir = write_run(tmp_path_factory.mktemp('run') / 'done')
    text = write_report(workdir).read_text()
    return workdir, text, Page(text)


def test_one_file_that_loads_nothing(done):
    _, text, page = done
    assert not re.search(r'(https?:)?//[a-z0-9]+\.[a-z]', text, re.I), 'no address of any host'
    assert not re.search(r'@import|url\(|fetch\(|XMLHttpRequest|import\(', text)
    for tag, name, value in page.attributes:
        assert name not in ('src', 'href', 'srcset', 'action') or value.startswith(('data:', '#')), (tag, name, value)
    assert 'link' not in page.tags and 'iframe' not in page.tags
    assert ('meta', 'name', 'viewport') in page.attributes
    assert 'prefers-color-scheme:dark' in text


def test_every_budget_is_in_every_section(done):
    _, _, page = done
    for title in ('Quality against size', 'Result', 'Loss', 'Widths found by the router', 'Router probabilities over time',
                  'Expert load', 'Samples', 'The nested model'):  # fmt: skip
        for name in ARCHS:
            assert name in page.sections[title], f'{name} in {title}'
    assert 'Not there yet' not in page.sections
    assert '90 %' in page.sections['Result'] and '2.3000' in page.sections['Result']
    assert 'mlp@7=96' in page.sections['Result'].replace(' ', '')
    assert 'no smaller point of the grid' in page.sections['Widths found by the router']
    assert '384 · 192 · 96' in page.sections['The nested model'], 'widths of the block that differs'
    assert 'Not cut in any budget' in page.sections['The nested model']
    assert '"curriculum"' in page.text


def test_charts_carry_the_logged_numbers(done):
    workdir, _, page = done
    charts = [json.loads(data) for data in page.data if data.startswith('{')]
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    pretraining = next(chart for chart in charts if [series['n'] for series in chart['series']] == ['parent'])
    assert (pretraining['x0'], pretraining['x1']) == (0, STEPS['pretrain'])
    assert pretraining['series'][0]['x'] == [line['step'] for line in lines if line.get('stage') == 'pretrain' and 'loss' in line]
    scores = [line for line in lines if line['kind'] == 'eval' and line['budget'] == 'small']
    heldout = next(chart for chart in charts if any(series['x'] == [s['step'] for s in scores] for series in chart['series']))
    drawn = next(series for series in heldout['series'] if series['n'] == 'small')
    assert drawn['y'] == pytest.approx([line['bits_per_byte'] for line in scores], rel=1e-3)
    last = [line for line in lines if line['kind'] == 'router'][-1]
    areas = [chart for chart in charts if [series['n'] for series in chart['series']] == ['128', '112', '96', '64']]
    assert len(areas) == len(ARCHS)
    ends = [[series['y'][-1] for series in chart['series']] for chart in areas]
    assert ends == [pytest.approx(last['probabilities'][name]['embed'][0], abs=2e-3) for name in ARCHS]
    means = [[series['y'][-1] for series in chart['series']] for chart in charts if chart['series'][0]['n'] == '384']
    rows = [last['probabilities'][name]['mlp'] for name in ARCHS]
    assert means == [pytest.approx([(a + b) / 2 for a, b in zip(*two, strict=True)], abs=2e-3) for two in rows]
    loads = [chart['series'][0]['y'] for chart in charts if chart.get('unit') == 'expert']
    last = [line for line in lines if line['kind'] == 'experts'][-1]
    assert pytest.approx(last['load']['small']['layer_001'], rel=1e-2) in loads


def test_time_is_summed_over_processes_and_speeds_are_said_per_stage(done):
    _, _, page = done
    # Four processes, each with 17.5 s beside its steps of 0.4 s and their data.
    step, total = 0.4 * sum(STEPS.values()), 0.401 * sum(STEPS.values()) + 4 * 17.5
    text = page.sections['Time'].replace('\xa0', ' ')
    assert f'Goodput {100 * step / total:.0f} %' in text and 'in 4 processes' in text
    assert f'{int(total) // 60}m{total % 60:02.0f}s' in text
    assert text.count('2.5T') == len(STEPS) and text.count('40.0 %') == len(STEPS)
    for name in STEPS:
        assert name in text


def test_evaluators_have_their_last_scores_and_their_course(done):
    workdir, _, page = done
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    own = [line for line in lines if line['kind'] == 'evaluator' and line['evaluator'] == 'sums' and line['budget'] == 'mid']
    text = page.sections['Evaluators']
    assert f'{100 * own[-1]["scores"]["accuracy"]:.1f} %' in text and 'chance 25 %' in text
    notes = [line['scores'] for line in lines if line['kind'] == 'evaluator' and line['evaluator'] == 'notes']
    assert all(f'{score["bits_per_byte"]:.4f}' in text for score in notes[-len(ARCHS) :])
    charts = [json.loads(data) for data in page.data if data.startswith('{')]
    course = [line['scores']['accuracy'] for line in own]
    assert any(pytest.approx(course, rel=1e-3) == series['y'] for chart in charts for series in chart['series'])
    assert evaluated('small', 2.0)['sums']['accuracy'] > evaluated('full', 2.0)['sums']['accuracy']


def test_sizes_in_between_and_baselines_stand_beside_the_budgets(tmp_path):
    workdir, other = write_run(tmp_path / 'run'), write_run(tmp_path / 'other')
    rows = write_frontier(workdir, sum(STEPS.values()) - 5)
    page = Page(write_report(workdir, {'alone': other}).read_text())
    tips = [value for _, name, value in page.attributes if name == 'data-tip']
    for row in rows:
        assert any(row['widths'] in tip and f'{float(row["bits_per_byte"]):.4f}' in tip for tip in tips), row
        assert (row['widths'] in page.sections['Any size in between'].replace(' ', '')) == (row['frontier'] == '1')
        assert row['step'] == str(sum(STEPS.values()) - 5) and row['checkpoint'] == str(workdir)
    last = f'of step {sum(STEPS.values()) - 5}, not of the last, {sum(STEPS.values())}'
    assert last in page.sections['Any size in between']
    beside = page.sections['Beside models trained otherwise']
    for name, (_, score) in SCORES.items():
        assert f'alone: {name}' in beside and f'{score:.4f}' in beside
    assert '+0.0000' in beside, 'the other run is the same'
    tokens = sum(steps * (1024 if name == 'long' else 256) * 8 for name, steps in STEPS.items())
    assert f'{tokens / 1e6:.4g}M' in beside
    for label in ('active parameters', 'FLOPs per token'):
        assert label in page.sections['Quality against cost']
    unfinished = write_run(tmp_path / 'unfinished', 'short')
    with pytest.raises(UserError, match=r'baseline x in .*unfinished has no result yet'):
        write_report(workdir, {'x': unfinished})
    (workdir / 'pareto' / 'frontier.csv').write_text('cost\n1\n')
    with pytest.raises(UserError, match=r'frontier\.csv is no frontier'):
        write_report(workdir)


def test_text_of_the_run_cannot_become_markup(done, tmp_path):
    _, text, page = done
    assert 'Reads <small> & closes' in page.sections['Samples']
    assert 'Reads <small>' not in text
    workdir = write_run(tmp_path / 'run')
    metrics = (workdir / 'metrics.jsonl').read_text()
    (workdir / 'metrics.jsonl').write_text(metrics.replace('small', 'small</script><u>'))
    config = json.loads((workdir / 'config.json').read_text())
    config['name'] = '</title><script>alert(1)</script>'
    (workdir / 'config.json').write_text(json.dumps(config))
    hostile = write_report(workdir).read_text()
    assert 'u' not in Page(hostile).tags
    assert 'alert(1)</script>' not in hostile and '&lt;script&gt;alert(1)' in hostile


def test_pareto_png_is_a_wide_picture_of_its_own(done):
    workdir, _, _ = done
    data = (workdir / 'pareto.png').read_bytes()
    assert data[:8] == b'\x89PNG\r\n\x1a\n'
    width, height = struct.unpack('>II', data[16:24])
    assert width >= 1400 and 1.3 < width / height < 2.5


@pytest.mark.parametrize('part', PARTS[:-1])
def test_a_run_in_progress_says_what_is_missing(tmp_path, part):
    workdir = write_run(tmp_path / 'run', part)
    page = report(workdir)
    assert 'the final table' in page.sections['Not there yet']
    assert 'Result' not in page.sections and not (workdir / 'pareto.png').exists()
    reached = PARTS.index(part)
    assert ('Loss' in page.sections) == (reached >= 1)
    assert ('Router probabilities over time' in page.sections) == (reached >= 2)
    assert ('the search stage has not begun' in page.sections['Not there yet']) == (reached < 2)
    assert ('Widths found by the router' in page.sections) == (reached >= 3)
    if reached:
        step = sum(list(STEPS.values())[: reached - 1]) + list(STEPS.values())[reached - 1] // 2
        assert f'step {step:,} of {sum(STEPS.values()):,}' in page.text


def test_a_killed_writer_and_non_finite_numbers_are_no_obstacle(tmp_path):
    workdir = write_run(tmp_path / 'run')
    path, lines = workdir / 'metrics.jsonl', []
    for line in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines()):
        if line['kind'] == 'train' and line['stage'] == 'short':
            line |= {'loss/small': 'nan', 'loss': 'nan', 'skipped': 3}
        if line['kind'] == 'final':
            line['rows'][2] |= {'bits_per_byte': 'nan', 'gap_closed': None}
        if line['kind'] == 'experts':
            line['load']['full'] = {'layer_001': ['nan', 0.5, 0.5]}
        if line['kind'] == 'router' and line['step'] % 2:
            line['probabilities']['mid']['mlp'] = [['nan'] * 4] * 2
        lines.append(json.dumps(line))
    path.write_text('\n'.join(lines) + '\n{"kind": "train", "step": 9')
    page = report(workdir)
    assert 'nan' in page.sections['Result'] and '3 updates were skipped' in page.text
    assert (workdir / 'pareto.png').exists()
    for data in page.data[:-1]:
        assert 'NaN' not in data


def test_bad_workdirs_are_refused_in_one_sentence(tmp_path):
    def refused(workdir, words, kind=UserError):
        with pytest.raises(kind, match=words) as error:
            write_report(workdir)
        assert '\n' not in str(error.value) and str(workdir) in str(error.value)

    refused(tmp_path / 'nowhere', 'holds no run')
    (tmp_path / 'file').write_text('x')
    refused(tmp_path / 'file', 'holds no run|cannot read')
    broken = write_run(tmp_path / 'broken', 'pretrain')
    (broken / 'config.json').write_text('{"name": ')
    refused(broken, 'is not JSON')
    (broken / 'config.json').write_text('{"name": "x"}')
    refused(broken, 'not the config of a training run')
    (broken / 'config.json').write_text('[1, 2]')
    refused(broken, 'not the config of a training run')
    binary = write_run(tmp_path / 'binary', 'pretrain')
    (binary / 'config.json').write_bytes(b'\xff\xfe\x00\x81')
    refused(binary, 'not text')
    foreign = write_run(tmp_path / 'foreign', 'pretrain')
    (foreign / 'metrics.jsonl').write_text('3\n')
    refused(foreign, 'not of this program')
    edited = write_run(tmp_path / 'edited')
    text = (edited / 'metrics.jsonl').read_text()
    (edited / 'metrics.jsonl').write_text(text.replace('"active_parameters"', '"active"'))
    refused(edited, 'active_parameters')
    taken = write_run(tmp_path / 'taken', 'pretrain')
    (taken / 'report.html').mkdir()
    refused(taken, 'cannot write the report', WorkError)
