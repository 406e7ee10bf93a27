# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The order of the tests, and fixtures of those that run tools."""

import runpy
import sys
from collections import OrderedDict

import plain_configs  # noqa: F401
import pytest
from jobs import ROOT, draw_shapes, job_environment
from mmengine.registry import DefaultScope

# Minutes each: they start first, so that no worker of pytest-xdist ends long after the others.
SLOW = ['test_launchers', 'test_custom_dataset', 'test_distributed', 'test_train_all', 'test_tools']


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW)))


@pytest.fixture(autouse=True)
def no_default_scope(monkeypatch):
    """The scope in which registries look is not that of an earlier test."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder to work in, with the demo's data set in ``shapes``."""
    folder = tmp_path_factory.mktemp('work')
    draw_shapes(folder / 'shapes')
    return folder


@pytest.fixture(scope='module')
def environment(folder):
    """Variables of a job that trains on these shapes."""
    return job_environment(folder)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a tool in this process, in a folder; its exit code or sentence, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [str(ROOT / tool), *map(str, arguments)])
        # As where it is started: its own folder, and none of other tools that tests have loaded.
        ours = str(ROOT / 'tools'), str(ROOT / 'demo')
        others = [path for path in sys.path if not path.startswith(ours)]
        monkeypatch.setattr(sys, 'path', [str((ROOT / tool).parent), *others])
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.fixture
def convert(call):
    """Run a converter of data sets."""
    return lambda tool, *arguments: call(f'tools/dataset_converters/{tool}', *arguments)
