#!/usr/bin/env bash
# Runs what needs no compiled operator of mmcv with another Python and another PyTorch, in an environment
# that it makes and keeps, and prints a row of the compatibility table.
set -euo pipefail

usage='usage: tools/misc/test_versions.sh PYTHON TORCH_VERSION [TEST_FILE...]
example: tools/misc/test_versions.sh python3.13 2.14.1
The environments are in work_dirs/versions: several GB each, remove them when you are done.'
if [ $# -gt 1 ]; then
    tests=("${@:3}")
    folder=$(dirname "$0")/../../work_dirs/versions/$(basename "$1")-$2
    [ -x "$folder/bin/python" ] || "$1" -m venv "$folder"
    set -- "$(cd "$folder" && pwd)" "torch==$2" torchvision
fi
. "$(dirname "$0")/environment.sh"

has torch || pip_install --no-cache-dir "${torch[@]}"
keep_torch
# No cache: a later `make env` would take out of it the mmcv whose isolated build left the operators out.
has_package onedl-mmcv ||
    pip_install --no-cache-dir --constraint "$constraints" opencv-python-headless onedl-mmcv==2.3.6
pip_install --constraint "$constraints" 'setuptools>=77' wheel
pip_install --constraint "$constraints" --no-build-isolation --editable '.[all,test]'
look mmdet mmseg mmpretrain.models

say Testing
log=$env_dir/tests.log
[ ${#tests[@]} -gt 0 ] || read -ra tests <<< "$(make --no-print-directory operator-free-tests)"
OMP_NUM_THREADS=1 "$python" -m pytest -q "${tests[@]}" 2>&1 | tee "$log" || true
"$python" -W ignore - "$log" << 'PYTHON'
import platform, sys
import torch, torchvision
result = open(sys.argv[1]).read().strip().splitlines()[-1].strip('= ').split(' in ')[0]
print(f'| {platform.python_version()} | {torch.__version__} | {torchvision.__version__} | {result} |')
PYTHON
