#!/usr/bin/env bash
# Runs what needs no compiled operator of mmcv with another Python and another PyTorch, in an environment
# that it makes and keeps, and prints a row of the compatibility table.
set -euo pipefail

usage='usage: tools/misc/test_versions.sh PYTHON TORCH_VERSION [PYTEST_ARGUMENT...]
example: tools/misc/test_versions.sh python3.13 2.14.1
The environments are in work_dirs/versions: several GB each, remove them when you are done.'
if [ $# -gt 1 ]; then
    interpreter=$1 version=$2 pytest=("${@:3}")
    folder=$(dirname "$0")/../../work_dirs/versions/$(basename "$1")-$2
    [ -x "$folder/bin/python" ] || "$interpreter" -m venv "$folder"
    set -- "$(cd "$folder" && pwd)" "torch==$version" torchvision
fi
. "$(dirname "$0")/environment.sh"

has torch || pip_install --no-cache-dir "${torch[@]}"
keep_torch
pip_install 'setuptools>=77' wheel ninja numpy packaging psutil opencv-python-headless
# No cache: a later `make env` would take this mmcv out of it.
has_package onedl-mmcv ||
    MMCV_WITH_OPS=0 pip_install --no-cache-dir --no-build-isolation --constraint "$constraints" onedl-mmcv==2.3.6
pip_install --constraint "$constraints" --no-build-isolation --editable '.[all,test]'
print_versions

say "Testing"
log=$env_dir/tests.log
OMP_NUM_THREADS=1 "$python" -m pytest -q $(make --no-print-directory operator-free-tests) "${pytest[@]}" 2>&1 | tee "$log" || true
"$python" -W ignore - "$log" << 'PYTHON'
import platform, re, sys
import torch, torchvision
result = re.sub(r'=| in .*', '', open(sys.argv[1]).read().strip().splitlines()[-1]).strip()
print(f'| {platform.python_version()} | {torch.__version__} | {torchvision.__version__} | {result} |')
PYTHON
