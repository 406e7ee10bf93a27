# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What all command lines have in common: help with an example, and one sentence for an error."""

import os
import re
import shlex
import subprocess

import pytest
from doc_blocks import ROOT, environment
from jobs import draw_shapes, finish, start_tool

PYTHON = sorted(
    str(path.relative_to(ROOT))
    for folder in ('tools', 'demo')
    for path in (ROOT / folder).glob('**/*.py')
    # The others are imported.
    if "__name__ == '__main__'" in path.read_text()
)
SHELL = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / 'tools').glob('**/*.sh')
    # The others are sourced, or called by the set-up and by commits alone.
    if os.access(path, os.X_OK) and path.name not in ('mmcv_cxx.sh', 'count_lines.sh')
)
DETECTOR = str(ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py')
SEGMENTOR = str(ROOT / 'tests' / 'data' / 'tiny_upernet.py')
# Of each tool, command lines with one thing missing or wrong, and the word that names it.
MISTAKES = {
    'demo/image_demo.py': [
        (f'nowhere.jpg {DETECTOR} nowhere.pth --out-dir out', 'nowhere.jpg'),
        ('shapes nowhere.py nowhere.pth --out-dir out', 'nowhere.py'),
        (f'shapes {DETECTOR} nowhere.pth --out-dir out', 'nowhere.pth'),
        (f'shapes {DETECTOR} broken.pth --out-dir out', 'broken.pth'),
    ],
    'demo/onnx_demo.py': [
        ('nowhere.jpg nowhere.onnx --out out.jpg', 'nowhere.jpg'),
        ('shapes/photo.jpg nowhere.onnx --out out.jpg', 'nowhere.onnx'),
    ],
    'tools/analysis_tools/benchmark.py': [('--models nowhere', 'nowhere')],
    'tools/analysis_tools/compare_runs.py': [('nowhere', 'nowhere')],
    'demo/report.py': [('--det-dir nowhere --seg-dir x --data shapes --out-dir out', 'nowhere')],
    'tools/analysis_tools/get_flops.py': [('--xml', '--xml')],
    'tools/analysis_tools/plot_logs.py': [('nowhere --out curves.png', 'nowhere')],
    'tools/analysis_tools/results_page.py': [('nowhere', 'nowhere')],
    'tools/analysis_tools/roofline.py': [('--gpus nowhere', 'nowhere')],
    'tools/analysis_tools/visualize_backbone.py': [
        ('nowhere.jpg --out-dir out', 'nowhere.jpg'),
        ('shapes/photo.jpg --config nowhere.py --out-dir out', 'nowhere.py'),
    ],
    'tools/train_all.py': [('nowhere', 'nowhere')],
    'tools/dataset_converters/coco_to_coco.py': [('nowhere out', 'nowhere')],
    'tools/dataset_converters/download_data.py': [('imagenet', 'imagenet')],
    'tools/dataset_converters/instance_maps_to_coco.py': [('nowhere out', 'nowhere')],
    'tools/dataset_converters/labelme_to_coco.py': [('nowhere out', 'nowhere')],
    'tools/dataset_converters/masks_to_labels.py': [('nowhere out --classes a,b', 'nowhere')],
    'tools/dataset_converters/voc_to_coco.py': [('nowhere out', 'nowhere')],
    'tools/dataset_converters/yolo_to_coco.py': [('nowhere out', 'nowhere')],
    'tools/misc/new_config.py': [('nowhere --task detection', 'nowhere')],
    'tools/misc/with_scalablevit.py': [('nowhere.py --out out.py', 'nowhere.py')],
    'tools/model_converters/get_weights.py': [('tiny', 'tiny')],
    'tools/check_data.py': [
        ('nowhere.py', 'nowhere.py'),
        ('coco --root nowhere --cfg-options a', '--cfg-options'),
    ],
    'demo/shapes.py': [('file.txt', 'file.txt')],
    'tools/deployment/export_onnx.py': [('nowhere.py --out model.onnx', 'nowhere.py')],
    'tools/model_converters/mm_to_scalablevit.py': [('nowhere.pth out.pth', 'nowhere.pth')],
    'tools/model_converters/publish_model.py': [('nowhere.pth out.pth', 'nowhere.pth')],
    'tools/model_converters/scalablevit_to_mm.py': [('nowhere.pth out.pth', 'nowhere.pth')],
    'tools/test.py': [
        ('nowhere.py nowhere.pth', 'nowhere.py'),
        ('broken.py nowhere.pth', 'broken.py'),
        (f'{DETECTOR} nowhere.pth', 'nowhere.pth'),
        (f'{DETECTOR} broken.pth --out nowhere.txt', 'nowhere.txt'),
    ],
    'tools/train.py': [
        ('nowhere.py', 'nowhere.py'),
        ('broken.py', 'broken.py'),
        (f'{DETECTOR} --resume nowhere.pth', 'nowhere.pth'),
        (f'{DETECTOR} --cfg-options modell.type=RetinaNet', 'modell'),
        (f'{DETECTOR} --cfg-options train_dataloader.dataset.data_root=nowhere', 'nowhere'),
        (f'{SEGMENTOR} --work-dir file.txt', 'file.txt'),
        ('no_optimizer.py --amp', 'no_optimizer.py'),
        (f'{SEGMENTOR} --work-dir 1 --cfg-options param_scheduler.1.gamma=0.5', 'gamma'),
        (f'{SEGMENTOR} --work-dir 2 --cfg-options optim_wrapper.constructor=Nowhere', 'Nowhere'),
    ],
}
SHELL_MISTAKES = {
    'tools/demo.sh': [('a b', 2)],
    'tools/dist_test.sh': [
        ('', 2),
        ('nowhere.py x.pth 1', 1),
        (f'{DETECTOR} nowhere.pth 1', 1),
        (f'{DETECTOR} broken.pth many', 1),
    ],
    'tools/dist_train.sh': [('', 2), ('nowhere.py 1', 1), (f'{DETECTOR} many', 1)],
    'tools/misc/gpu_kit.sh': [('', 2), ('measure', 2), ('fly away', 2), ('setup nowhere', 1)],
    'tools/misc/setup_env.sh': [('', 2)],
    'tools/misc/setup_openmmlab.sh': [('', 2)],
    'tools/misc/test_versions.sh': [('', 2)],
    'tools/slurm_test.sh': [
        ('', 2),
        ('gpu job nowhere.py x.pth', 1),
        (f'gpu job {DETECTOR} nowhere.pth', 1),
    ],
    'tools/slurm_train.sh': [('', 2), ('gpu job nowhere.py work', 1)],
}
CASES = [(tool, '--help', '') for tool in PYTHON] + [
    (tool, arguments, named) for tool in PYTHON for arguments, named in MISTAKES.get(tool, [])
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a data set of one photo, a damaged checkpoint and damaged configs."""
    folder = tmp_path_factory.mktemp('habits')
    draw_shapes(folder / 'shapes', num_train=4, num_val=2)
    photo = folder / 'shapes' / 'photo.jpg'
    photo.write_bytes((folder / 'shapes/images/training/000001.jpg').read_bytes())
    (folder / 'broken.pth').write_bytes(b'no checkpoint')
    (folder / 'broken.py').write_text('model = dict(\n')
    (folder / 'file.txt').write_text('no folder')
    (folder / 'no_optimizer.py').write_text("default_scope = 'mmdet'\nmodel = dict(type='A')\n")
    return folder


@pytest.fixture(scope='module')
def outcomes(folder):
    """The exit code and output of every command."""
    variables = {**environment(), 'SHAPES_ROOT': 'shapes', 'COLUMNS': '200'}
    found = {}
    for number, case in enumerate(CASES):
        command, log = [ROOT / case[0], *shlex.split(case[1])], folder / f'{number}.log'
        found[case] = finish(start_tool(command, folder, log, variables)), log.read_text()
    return found


@pytest.mark.parametrize('tool', PYTHON)
def test_help_has_an_example(tool, outcomes):
    code, said = outcomes[tool, '--help', '']

    assert code == 0, said[-2000:]
    assert f'example: python {tool} ' in ' '.join(said.split()) + ' '
    options, example = said.split('\noptions:\n')[1].rsplit('example: ', 1)
    for option in re.split(r'\n  (?=-)', options)[1:]:
        assert re.search(r'\s{2,}\S', option), f'no help for {option}'
    assert all(line.endswith(' \\') for line in example.strip().split('\n')[:-1]), example


@pytest.mark.parametrize('tool', PYTHON)
def test_mistakes_are_known(tool):
    assert MISTAKES.get(tool), f'say in MISTAKES how {tool} can be called wrongly'


@pytest.mark.parametrize(
    'case', CASES[len(PYTHON) :], ids=lambda case: f'{case[0]}-{case[1]}'.replace(str(ROOT), '')
)
def test_mistake_ends_in_one_sentence(case, outcomes):
    code, said = outcomes[case]

    assert code > 0, said[-2000:]
    assert 'Traceback' not in said, said[-3000:]
    errors = [line for line in said.splitlines() if 'error: ' in line]
    assert len(errors) == 1, said[-2000:]
    assert case[2] in errors[0]
    # The sentence is the last thing said.
    assert said.rstrip().endswith(errors[0])


@pytest.mark.parametrize('tool', SHELL)
@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_of_a_script_has_an_example(tool, flag):
    said = subprocess.run(
        ['bash', str(ROOT / tool), flag], capture_output=True, text=True, check=True
    )

    assert said.stdout.startswith('usage: ')
    assert '\nexample: ' in said.stdout
    assert not said.stderr
    assert os.access(ROOT / tool, os.X_OK)


@pytest.mark.parametrize(
    ('tool', 'words', 'code'),
    [(tool, *mistake) for tool in SHELL for mistake in SHELL_MISTAKES.get(tool, [('', None)])],
)
def test_mistake_in_a_script_ends_in_one_sentence(tool, words, code, folder):
    assert code is not None, f'say in SHELL_MISTAKES how {tool} can be called wrongly'
    process = subprocess.run(
        ['bash', str(ROOT / tool), *shlex.split(words)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )

    assert process.returncode == code
    assert not process.stdout
    if code == 2:
        assert process.stderr.startswith('usage: ')
        assert '\nexample: ' in process.stderr
    else:
        assert process.stderr.startswith('error: ')
        assert process.stderr.count('\n') == 1
