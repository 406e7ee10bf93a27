# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The tutorial: it runs from top to bottom, and what is committed with it is a true run's."""

import re

import pytest
from jobs import ROOT

nbformat, nbclient, _ = (
    pytest.importorskip(name, reason='the notebook needs the extra "notebook"')
    for name in ('nbformat', 'nbclient', 'ipykernel')
)
NOTEBOOK = ROOT / 'demo' / 'tutorial.ipynb'


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook):
    """Everything that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    return ''.join(output.text for output in outputs if output.output_type == 'stream')


def pictures(notebook):
    """The number of pictures of each code cell that shows some."""
    outputs = [cell.get('outputs', []) for cell in notebook.cells]
    counts = [sum('image/png' in output.get('data', {}) for output in cell) for cell in outputs]
    return [count for count in counts if count]


def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    notebook = read()
    variables = dict(TUTORIAL_ITERATIONS='4', TUTORIAL_IMAGES='8', PYTHONPATH=str(ROOT))
    for name, value in dict(variables, CUDA_VISIBLE_DEVICES='', IPYTHONDIR=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    resources = {'metadata': {'path': str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    said = printed(notebook)
    assert 'stage 4: (1, 512, 15, 20), 2 blocks' in said
    assert '8 training and 40 validation images' in said
    assert 'trained for 4 iterations' in said
    assert 0 <= float(re.search(r'mIoU: ([\d.]+) %', said)[1]) <= 100
    assert (tmp_path / 'work_dirs/tutorial/upernet/iter_4.pth').is_file()
    # The data, the curves, the features and the predictions.
    assert pictures(notebook) == [1, 1, 1, 1]


def test_committed_outputs_are_of_a_true_run():
    notebook = read()
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    said = printed(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(notebook) == [1, 1, 1, 1]
    steps = int(re.search(r"'TUTORIAL_ITERATIONS', (\d+)", cells[0].source)[1])
    assert f'trained for {steps} iterations' in said
    # Far more than guessing: the background alone gives 17.
    assert float(re.search(r'mIoU: ([\d.]+) %', said)[1]) > 50


def test_committed_file_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 1e6
    assert not re.search(r'/(tmp|root|home|work|usr)/', text)
    assert 'Traceback' not in text


def test_links_resolve():
    markdown = '\n'.join(cell.source for cell in read().cells if cell.cell_type == 'markdown')
    targets = re.findall(r'\]\(([^)#]+)[^)]*\)', markdown)
    assert targets
    for target in targets:
        assert (NOTEBOOK.parent / target).exists(), target
