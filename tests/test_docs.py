# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The pages: commands run or are read by the tools' parsers, links resolve, figures are right."""

import ast
import glob
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from doc_blocks import LOADERS, ROOT, read_blocks, run_commands
from test_metafiles import MODEL_ENTRIES, TASKS, metrics

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
ALL = sorted(
    path for pattern in ('*.md', 'configs/**/*.md', 'docs/**/*.md') for path in ROOT.glob(pattern)
)
SHELL = [
    (page.relative_to(ROOT), number, block)
    for page in ALL
    for number, block in enumerate(read_blocks(page))
    if block.language == 'bash'
]
FOLDERS = ('detection', 'segmentation', 'classification', 'demo')
LINK = re.compile(r'\[[^]]*\]\(([^)\s]+)\)')
# Metadata and metrics by config.
PUBLISHED = {model['Config']: (model['Metadata'], metrics(model)) for model in MODEL_ENTRIES}
# The tools behind the launchers, and what these pass on.
LAUNCHERS = {
    'dist_train.sh': ('tools/train.py', lambda config, gpus, *rest: [config, *rest]),
    'dist_test.sh': ('tools/test.py', lambda config, file, gpus, *rest: [config, file, *rest]),
    'slurm_train.sh': ('tools/train.py', lambda _, job, config, folder, *rest: [config, *rest]),
    'slurm_test.sh': ('tools/test.py', lambda _, job, config, file, *rest: [config, file, *rest]),
}
# What makes the commands of tested blocks short.
SETTINGS = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.logger.interval=1']
SHORT = {
    'shapes.py': ['--num-train', '4', '--num-val', '2', '--workers', '1'],
    'train.py': ['--cfg-options', *LOADERS, *SETTINGS],
}


def own_test(page):
    """Whether another test runs the tested blocks of a page."""
    others = set((ROOT / 'tests').glob('test_*.py')) - {Path(__file__)}
    return any(f"'{page.name}'" in test.read_text() for test in others)


def words(text):
    """The commands of a block: lists of words, with the block's own variables put in."""
    variables = {'TOOLS': 'tools'}
    # What another program prints is not known here; the tests of the page run it.
    for line in commands(re.sub(r'^[A-Z_]+=\$\(.*\)\S*$', '', text, flags=re.MULTILINE)):
        for name, value in variables.items():
            line = re.sub(rf'\$({name}\b|{{{name}}})', lambda _, value=value: value, line)
        found = shlex.split(line, comments=True)
        while found and re.fullmatch(r'[A-Z_]+=.*', found[0], flags=re.DOTALL):
            name, value = found.pop(0).split('=', 1)
            variables[name] = value
        if found:
            yield found


def commands(text):
    """The commands of a block; a quoted text may span lines."""
    rest = ''
    for line in text.replace('\\\n', ' ').splitlines():
        rest += line
        if rest.count('"') % 2 or rest.count("'") % 2:
            rest += '\n'
            continue
        yield from re.split(r' && | \| ', rest)
        rest = ''


@pytest.mark.parametrize(
    'page', [page.relative_to(ROOT) for page in [*PAGES, ROOT / 'CONTRIBUTING.md']], ids=str
)
def test_every_block_is_marked(page):
    for block in read_blocks(ROOT / page):
        if block.language == 'bash':
            assert block.note, f'no mark "tested: ..." or "not tested: REASON" above\n{block.text}'
    # A mark that stands apart from its block would say nothing.
    blocks = sum(bool(block.mark) for block in read_blocks(ROOT / page))
    text = re.sub(r'`[^`\n]*`', '', (ROOT / page).read_text())
    assert blocks == len(re.findall(r'<!-- (?:not )?tested: ', text))


@pytest.mark.parametrize(
    ('page', 'number', 'block'), SHELL, ids=[f'{page}-{number}' for page, number, _ in SHELL]
)
def test_commands_are_accepted(page, number, block, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    subprocess.run(['bash', '-n'], input=block.text, text=True, check=True)
    for command in words(block.text):
        program, *rest = command
        if program == 'make':
            targets = [word for word in rest if '=' not in word]
            for target in targets:
                assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        elif program.endswith('.sh'):
            assert os.access(ROOT / program, os.X_OK), program
            tool, passed = LAUNCHERS[Path(program).name]
            check_tool([tool, *passed(*rest)], monkeypatch, capsys)
        elif program == 'python' and rest[0].endswith('.py'):
            check_tool(rest, monkeypatch, capsys)
        elif program == 'python' and rest[0] == '-m':
            assert importlib.util.find_spec(rest[1]), rest[1]
        elif program == 'python':
            assert rest[0] == '-c'
            ast.parse(rest[1])
        else:
            known = 'pip source tensorboard ln cd git docker trtexec'
            assert program in known.split(), program


def check_tool(command, monkeypatch, capsys):
    """A tool exists and takes the arguments; configs that are named exist and take the options."""
    script, *arguments = command
    for word in arguments:
        if re.match(r'configs/.*\.py$', word):
            assert glob.glob(word), f'{word} does not exist'
    if script.startswith('.venv/'):
        # The toolboxes' own tools, which tests/test_tools.py runs.
        return
    monkeypatch.setattr(sys, 'argv', command)
    # Where Python looks first when it runs a script.
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    try:
        # As the tool's own parser reads them.
        args = runpy.run_path(str(ROOT / script))['parse_args']()
    except SystemExit as error:
        pytest.fail(f'{shlex.join(command)}: {error.code} {capsys.readouterr().err}')
    options = getattr(args, 'cfg_options', None)
    if script in ('tools/train.py', 'tools/test.py') and options and Path(args.config).is_file():
        from mmscalablevit import cli

        cli.load_config(args)


@pytest.mark.parametrize(
    'page',
    [
        page
        for page in PAGES
        if any(block.mark == 'tested' for block in read_blocks(page)) and not own_test(page)
    ],
    ids=lambda page: page.name,
)
def test_tested_blocks_run(page, tmp_path):
    for part in ('tools', 'configs', 'demo'):
        (tmp_path / part).symlink_to(ROOT / part)
    to_run, expected = [], []
    for number, block in enumerate(read_blocks(page)):
        if block.kind == 'python':
            (tmp_path / f'block{number}.py').write_text(block.text)
            to_run.append([f'block{number}.py'])
            # What a closing comment says it prints.
            expected += re.findall(r'^print\(.*\)\n# (.*)$', block.text, re.MULTILINE)
        elif block.mark == 'tested':
            assert block.kind == 'commands', f'{block.kind} needs a test of its own for {page.name}'
            for python, *command in words(block.text):
                assert python == 'python', f'{python} needs a test of its own for {page.name}'
                to_run.append([*command, *SHORT.get(Path(command[0]).name, [])])

    printed = run_commands(to_run, tmp_path)

    assert [text for text in expected if not any(text in said for said in printed)] == []


def test_model_zoo_is_up_to_date():
    zoo = runpy.run_path(str(ROOT / 'docs' / 'model_zoo.py'))

    assert zoo['PAGE'].read_text() == zoo['page'](), 'run python docs/model_zoo.py'


def test_every_claim_on_reliability_has_its_test():
    named = re.findall(r'`(test_\w+\.py)::(\w+)`', (ROOT / 'docs' / 'reliability.md').read_text())

    assert len(named) > 20
    for file, function in named:
        assert f'def {function}(' in (ROOT / 'tests' / file).read_text(), f'{file}::{function}'


def without_code(text):
    return re.sub(r'```.*?```', '', text, flags=re.DOTALL)


def anchors(path):
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r'^#+ (.+)$', without_code(path.read_text()), flags=re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def rows(path):
    """The rows of every table that name a config: its path and its cells by column."""
    header = None
    for line in path.read_text().splitlines():
        if not line.startswith('|'):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if header is None:
            header = cells
        elif LINK.search(cells[0]) and LINK.search(cells[0])[1].endswith('.py'):
            yield LINK.search(cells[0])[1], dict(zip(header, cells, strict=True))


ROWS = [
    (folder, config, cells)
    for folder in FOLDERS
    for config, cells in rows(ROOT / 'configs' / folder / 'README.md')
]


@pytest.mark.parametrize('page', ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in LINK.findall(without_code(page.read_text())):
        if '://' in target:
            continue
        name, _, anchor = target.partition('#')
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize('folder', FOLDERS)
def test_every_config_is_linked(folder):
    linked = LINK.findall((ROOT / 'configs' / folder / 'README.md').read_text())
    configs = {path.name for path in (ROOT / 'configs' / folder).glob('*.py')}

    assert configs
    assert configs - set(linked) == set()


@pytest.mark.parametrize(
    ('folder', 'config', 'cells'), ROWS, ids=[f'{folder}/{config}' for folder, config, _ in ROWS]
)
def test_figures_are_those_of_the_metafile(folder, config, cells):
    metadata, wanted = PUBLISHED[f'configs/{folder}/{config}']
    columns = {column.replace(' ms+flip', '(ms+flip)'): cell for column, cell in cells.items()}
    said = {column: float(x) for column, x in columns.items() if column in TASKS and x != '-'}

    assert said == wanted
    if 'Params' in cells:
        assert float(cells['Params']) == pytest.approx(metadata['Parameters'] / 1e6, abs=0.06)
    if cells.get('GFLOPs') and 'FLOPs' in metadata:
        assert float(cells['GFLOPs']) == pytest.approx(metadata['FLOPs'] / 1e9, rel=0.01)


@pytest.mark.parametrize('folder', ['detection', 'segmentation', 'classification'])
def test_published_results_are_marked(folder):
    text = (ROOT / 'configs' / folder / 'README.md').read_text()

    assert '**published by the authors, not reproduced here**' in text
    assert '**inferred**' in text.lower()


def test_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())

    assert f"'{cited['version']}'" in (ROOT / 'mmscalablevit' / 'version.py').read_text()
    title = cited['preferred-citation']['title']
    assert f'title={{{title}}}' in (ROOT / 'README.md').read_text()


def test_no_page_names_a_file_of_this_machine():
    pages = ' '.join(page.read_text() for page in ALL)

    assert not re.search(r'/(tmp|root|home)/', pages)
