"""The notebook runs from top to bottom, on a checkpoint that it trains itself; what is committed is what it printed."""

from pathlib import Path

import nbclient
import nbformat
import pytest

PATH = Path(__file__).parent.parent / 'experiments' / 'colab' / 'restore_and_slice.ipynb'


def printed(notebook):
    """Everything that the cells wrote on stdout."""
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    return ''.join(output.get('text', '') for output in outputs if output.get('name') == 'stdout')


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    return [output['data']['image/png'] for output in outputs if 'image/png' in output.get('data', {})]


def test_the_committed_outputs_are_whole():
    notebook = nbformat.read(PATH, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), 'run it from top to bottom and save it'
    assert not [output for cell in cells for output in cell.outputs if output.output_type == 'error']
    assert len(pictures(notebook)) == 1 and 'model.safetensors' in printed(notebook)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    notebook = nbformat.read(PATH, 4)
    training = next(cell for cell in notebook.cells if "{'steps': 200" in cell.source)
    training.source = training.source.replace("'steps': 200", "'steps': 8").replace("'steps': 30", "'steps': 4")
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            cell.outputs, cell.execution_count = [], None
    resources = {'metadata': {'path': str(PATH.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name='python3', resources=resources).execute()
    text = printed(notebook)
    read = {line.split()[0]: line for line in text.splitlines() if ' of float32, read ' in line}
    assert list(read) == ['full', 'mid', 'small'], text
    assert len(pictures(notebook)) == 1
    assert 'NemotronHForCausalLM: at most' in text
    apart = float(text.partition('NemotronHForCausalLM: at most ')[2].split()[0])
    assert apart < 1e-4
