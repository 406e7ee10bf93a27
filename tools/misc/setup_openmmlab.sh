#!/usr/bin/env bash
# Installs mmscalablevit with the original OpenMMLab packages into a Python environment of its own,
# to test with them. mmcv comes without its compiled operators, and so the models of mmdet and mmseg
# cannot be imported; their configs can be compared. Safe to call again.
set -euo pipefail

usage='usage: tools/misc/setup_openmmlab.sh ENV_DIR TORCH_REQUIREMENT...
The variable MMCV_LITE replaces mmcv-lite==2.1.0.
example: tools/misc/setup_openmmlab.sh .venv-openmmlab torch==2.14.1 torchvision==0.29.1'
. "$(dirname "$0")/environment.sh"

ORIGINAL=(mmengine==0.10.7 "${MMCV_LITE:-mmcv-lite==2.1.0}" mmpretrain==1.2.0 mmdet==3.3.0
    mmsegmentation==1.2.2 ftfy regex)

for maintained in onedl-mmengine onedl-mmcv; do
    has_package "$maintained" &&
        fail "$env_dir has $maintained, of the same import name as an original package: choose another environment"
done

has torch || say "Installing ${torch[*]}"
pip_install "${torch[@]}"
keep_torch

say "Installing mmscalablevit and the test tools with ${ORIGINAL[*]}"
pip_install 'setuptools>=68' wheel
pip_install --constraint "$constraints" "${ORIGINAL[@]}"
pip_install --constraint "$constraints" --no-build-isolation --editable '.[test]'

if ! has cv2; then
    say 'No display library found: taking the headless OpenCV'
    pip_install --force-reinstall --no-deps opencv-python-headless
fi
look mmdet mmseg mmpretrain.models
