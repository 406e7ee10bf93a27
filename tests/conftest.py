# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The order of the tests, and the fixture of the converters."""

import runpy
import sys
from pathlib import Path

import pytest

CONVERTERS = Path(__file__).parents[1] / 'tools' / 'dataset_converters'

# Minutes each: they start first, so that no worker of pytest-xdist ends long after the others.
SLOW = ['test_launchers', 'test_custom_dataset', 'test_distributed', 'test_train_all', 'test_tools']


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW)))


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Call a converter in a folder; its exit code or sentence, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(CONVERTERS))

    def call(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(CONVERTERS / tool), run_name='__main__')
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return call
