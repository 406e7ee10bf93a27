#!/usr/bin/env bash
# Installs mmscalablevit with the original OpenMMLab packages into a Python environment of its own,
# to test with them. mmcv comes without its compiled operators, and so the models of mmdet and mmseg
# cannot be imported; their configs can be compared. Safe to call again.
set -euo pipefail

usage='usage: tools/misc/setup_openmmlab.sh ENV_DIR TORCH_REQUIREMENT...
The variable MMCV_LITE replaces mmcv-lite==2.1.0.
example: tools/misc/setup_openmmlab.sh .venv-openmmlab torch==2.13.0 torchvision==0.28.0'
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    echo "$usage"
    exit
fi
if [ $# -lt 2 ]; then
    echo "$usage" >&2
    exit 2
fi
env_dir=$1
shift
cd "$(dirname "$0")/../.."

ORIGINAL=(mmengine==0.10.7 "${MMCV_LITE:-mmcv-lite==2.1.0}" mmpretrain==1.2.0 mmdet==3.3.0
    mmsegmentation==1.2.2 ftfy regex)

say() { printf '\n== %s\n' "$*"; }
has() { "$python" -c "import $1" > /dev/null 2>&1; }
has_package() { "$python" -m pip show --quiet "$1" 2> /dev/null; }
pip_install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

if [ ! -x "$env_dir/bin/python" ]; then
    say "Creating the virtual environment $env_dir"
    python3 -m venv "$env_dir" ||
        fail 'python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv'
fi
python=$env_dir/bin/python
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $env_dir has $("$python" --version)"
for maintained in onedl-mmengine onedl-mmcv; do
    has_package "$maintained" &&
        fail "$env_dir has $maintained, of the same import name as an original package: choose another environment"
done

has torch || say "Installing $*"
pip_install "$@"
# Nothing below may replace the torch that is there.
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
"$python" -m pip freeze | grep -E '^(torch|torchvision)==' | sed 's/+.*//' > "$constraints"

say "Installing mmscalablevit and the test tools with ${ORIGINAL[*]}"
pip_install 'setuptools>=68' wheel
pip_install --constraint "$constraints" "${ORIGINAL[@]}"
pip_install --constraint "$constraints" --no-build-isolation --editable '.[test]'

if ! has cv2; then
    say 'No display library found: taking the headless OpenCV'
    pip_install --force-reinstall --no-deps opencv-python-headless
fi
"$python" -W ignore -c 'import mmscalablevit, mmdet, mmseg, mmpretrain.models'
say "Ready: $("$python" -W ignore -c '
import mmscalablevit, mmengine, mmcv, mmdet, mmseg, mmpretrain, torch
print(*(f"{m.__name__} {m.__version__}" for m in (mmscalablevit, torch, mmengine, mmcv, mmdet, mmseg, mmpretrain)), sep=", ")')"
