# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What all command lines have in common: help with an example, and one sentence for an error."""

import os
import re
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
# Of each tool, command lines with one thing missing or wrong, and what the sentence says of it;
# more in test_bad_input.py and test_hostile_commands.py.
MISTAKES = """
demo/image_demo.py nowhere.jpg DETECTOR nowhere.pth --out-dir out : nowhere.jpg
demo/image_demo.py shapes/images/training nowhere.py nowhere.pth --out-dir out : nowhere.py
demo/image_demo.py shapes/images/training DETECTOR nowhere.pth --out-dir out : nowhere.pth
demo/image_demo.py shapes/images/training DETECTOR broken.pth --out-dir out : broken.pth
demo/onnx_demo.py nowhere.jpg nowhere.onnx --out out.jpg : nowhere.jpg
demo/onnx_demo.py PHOTO nowhere.onnx --out out.jpg : nowhere.onnx
demo/report.py --det-dir nowhere --seg-dir x --data shapes --out-dir out : nowhere
demo/shapes.py file.txt : file.txt
tools/analysis_tools/benchmark.py --models nowhere : nowhere
tools/analysis_tools/compare_runs.py nowhere : nowhere
tools/analysis_tools/get_flops.py --xml : --xml
tools/analysis_tools/plot_logs.py nowhere --out curves.png : nowhere
tools/analysis_tools/results_page.py nowhere : nowhere
tools/analysis_tools/roofline.py --gpus nowhere : nowhere
tools/analysis_tools/visualize_backbone.py nowhere.jpg --out-dir out : nowhere.jpg
tools/analysis_tools/visualize_backbone.py PHOTO --config nowhere.py --out-dir out : nowhere.py
tools/check_data.py nowhere.py : nowhere.py
tools/check_data.py coco --root nowhere --cfg-options a : --cfg-options
tools/dataset_converters/coco_to_coco.py nowhere out : nowhere
tools/dataset_converters/download_data.py imagenet : imagenet
tools/dataset_converters/instance_maps_to_coco.py nowhere out : nowhere
tools/dataset_converters/labelme_to_coco.py nowhere out : nowhere
tools/dataset_converters/masks_to_labels.py nowhere out --classes a,b : nowhere
tools/dataset_converters/voc_to_coco.py nowhere out : nowhere
tools/dataset_converters/yolo_to_coco.py nowhere out : nowhere
tools/deployment/export_onnx.py nowhere.py --out model.onnx : nowhere.py
tools/misc/new_config.py nowhere --task detection : nowhere
tools/misc/with_scalablevit.py nowhere.py --out out.py : nowhere.py
tools/model_converters/get_weights.py tiny : tiny
tools/model_converters/mm_to_scalablevit.py nowhere.pth out.pth : nowhere.pth
tools/model_converters/publish_model.py nowhere.pth out.pth : nowhere.pth
tools/model_converters/scalablevit_to_mm.py nowhere.pth out.pth : nowhere.pth
tools/test.py nowhere.py nowhere.pth : nowhere.py
tools/test.py broken.py nowhere.pth : broken.py
tools/test.py DETECTOR nowhere.pth : nowhere.pth
tools/test.py DETECTOR broken.pth --out x.txt : --out must end in .pkl for mmdet, got x.txt
tools/test.py SEGMENTOR broken.pth --out file.pkl : --out must be a folder for mmseg, got file.pkl
tools/test.py DETECTOR broken.pth --tta : --tta needs tta_model
tools/train.py nowhere.py : nowhere.py
tools/train.py broken.py : broken.py
tools/train.py DETECTOR --resume nowhere.pth : nowhere.pth
tools/train.py DETECTOR --cfg-options modell.type=RetinaNet : modell
tools/train.py DETECTOR --cfg-options train_dataloader.dataset.data_root=nowhere : nowhere
tools/train.py DETECTOR --cfg-options val_evaluator.ann_file=no/such.json : 'no/such.json'
tools/train.py DETECTOR --auto-scale-lr --cfg-options auto_scale_lr=None : needs auto_scale_lr.base
tools/train.py DETECTOR --amp --cfg-options optim_wrapper.type=Other : type=OptimWrapper, got Other
tools/train.py SEGMENTOR --work-dir file.txt : file.txt
tools/train.py no_optimizer.py --amp : no_optimizer.py
tools/train.py SEGMENTOR --work-dir 1 --cfg-options param_scheduler.1.gamma=0.5 : gamma
tools/train.py SEGMENTOR --work-dir 2 --cfg-options optim_wrapper.constructor=Nowhere : Nowhere
tools/train_all.py nowhere : nowhere
"""
# Of each script, and its exit code: 2 comes with the usage.
SHELL_MISTAKES = """
tools/demo.sh a b : 2
tools/dist_test.sh : 2
tools/dist_test.sh nowhere.py x.pth 1 : 1
tools/dist_test.sh DETECTOR nowhere.pth 1 : 1
tools/dist_test.sh DETECTOR broken.pth many : 1
tools/dist_train.sh : 2
tools/dist_train.sh nowhere.py 1 : 1
tools/dist_train.sh DETECTOR many : 1
tools/misc/gpu_kit.sh : 2
tools/misc/gpu_kit.sh measure : 2
tools/misc/gpu_kit.sh fly away : 2
tools/misc/gpu_kit.sh setup nowhere : 1
tools/misc/setup_env.sh : 2
tools/misc/setup_openmmlab.sh : 2
tools/misc/test_versions.sh : 2
tools/slurm_test.sh : 2
tools/slurm_test.sh gpu job nowhere.py x.pth : 1
tools/slurm_test.sh gpu job DETECTOR nowhere.pth : 1
tools/slurm_train.sh : 2
tools/slurm_train.sh gpu job nowhere.py work : 1
"""


def cases(table):
    """What the lines of a table say: a command, and what is expected of it."""
    return [line.split(' : ') for line in table.strip().splitlines()]


def words(command):
    """A command with the paths that it stands for."""
    names = dict(PHOTO='shapes/images/training/000001.jpg', DETECTOR=DETECTOR, SEGMENTOR=SEGMENTOR)
    tool, *arguments = command.split()
    return [ROOT / tool, *(names.get(word, word) for word in arguments)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a data set, a damaged checkpoint and damaged configs."""
    folder = tmp_path_factory.mktemp('habits')
    draw_shapes(folder / 'shapes', num_train=2, num_val=1)
    (folder / 'broken.pth').write_bytes(b'no checkpoint')
    (folder / 'broken.py').write_text('model = dict(\n')
    (folder / 'file.txt').write_text('no folder')
    (folder / 'no_optimizer.py').write_text("default_scope = 'mmdet'\nmodel = dict(type='A')\n")
    return folder


@pytest.fixture
def outcome(folder, tmp_path):
    """Run a command; its exit code and output."""
    variables = {**environment(), 'SHAPES_ROOT': 'shapes', 'COLUMNS': '200'}

    def outcome(command):
        log = tmp_path / 'log.txt'
        return finish(start_tool(words(command), folder, log, variables)), log.read_text()

    return outcome


def test_mistakes_of_every_tool_are_known():
    for table, tools in ((MISTAKES, PYTHON), (SHELL_MISTAKES, SHELL)):
        assert {command.split()[0] for command, _ in cases(table)} == set(tools)


@pytest.mark.parametrize('tool', PYTHON)
def test_help_has_an_example(tool, outcome):
    code, said = outcome(f'{tool} --help')

    assert code == 0, said[-2000:]
    assert f'example: python {tool} ' in ' '.join(said.split()) + ' '
    options, example = said.split('\noptions:\n')[1].rsplit('example: ', 1)
    for option in re.split(r'\n  (?=-)', options)[1:]:
        assert re.search(r'\s{2,}\S', option), f'no help for {option}'
    assert all(line.endswith(' \\') for line in example.strip().split('\n')[:-1]), example


@pytest.mark.parametrize(('command', 'named'), cases(MISTAKES))
def test_mistake_ends_in_one_sentence(command, named, outcome):
    code, said = outcome(command)

    assert code > 0, said[-2000:]
    assert 'Traceback' not in said, said[-3000:]
    errors = [line for line in said.splitlines() if 'error: ' in line]
    assert len(errors) == 1, said[-2000:]
    assert named in errors[0]
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


@pytest.mark.parametrize(('command', 'code'), cases(SHELL_MISTAKES))
def test_mistake_in_a_script_ends_in_one_sentence(command, code, folder):
    process = subprocess.run(
        ['bash', *words(command)], cwd=folder, env=environment(), capture_output=True, text=True
    )

    assert process.returncode == int(code)
    assert not process.stdout
    if code == '2':
        assert process.stderr.startswith('usage: ')
        assert '\nexample: ' in process.stderr
    else:
        assert process.stderr.startswith('error: ')
        assert process.stderr.count('\n') == 1
