#!/usr/bin/env bash
# Installs everything mmscalablevit needs into one Python environment. Safe to call again: what is
# there is kept.
set -euo pipefail

usage='usage: tools/misc/setup_env.sh ENV_DIR [TORCH_REQUIREMENT...]
Without a requirement: the newest PyTorch that was tested, or one for which there is a compiled mmcv.
example: tools/misc/setup_env.sh .venv torch==2.14.1 torchvision==0.29.1'
. "$(dirname "$0")/environment.sh"
. tools/misc/mmcv_wheel.sh

MMENGINE=onedl-mmengine==0.10.12
MMCV=onedl-mmcv==2.3.6
NEWEST=(torch==2.14.1 torchvision==0.29.1)

if has torch; then
    say "Keeping torch $("$python" -c 'import torch; print(torch.__version__)')"
else
    [ ${#torch[@]} -gt 0 ] || read -ra torch <<< "$(torch_with_wheel)"
    [ ${#torch[@]} -gt 0 ] || torch=("${NEWEST[@]}")
    say "Installing ${torch[*]}"
    pip_install "${torch[@]}"
fi
has torchvision || fit_torchvision
keep_torch

# mmcv's project file needs that setuptools; the venv of Python 3.10 and 3.11 has an older one.
pip_install ninja numpy packaging psutil 'setuptools>=77' wheel
# The headless build first: mmcv then does not ask for the one that needs a display library.
has cv2 || pip_install opencv-python-headless
pip_install --constraint "$constraints" "$MMENGINE"

build_mmcv() {
    command -v c++ > /dev/null || fail 'No C++ compiler found; on Debian and Ubuntu: apt-get install g++ python3-dev'
    say "Compiling mmcv's operators: 3 minutes on 2 cores, unless pip kept them from an earlier time"
    local log=$env_dir/mmcv-build.log compiler
    compiler=$(mktemp -d)
    ln -s "$PWD/tools/misc/mmcv_cxx.sh" "$compiler/c++"
    export CXX_HEADER=$compiler/torch.hpp
    CXX_REAL=$(command -v c++)
    # For nvcc, too, the last word on the standard: see mmcv_cxx.sh.
    export CXX_REAL NVCC_APPEND_FLAGS=-std=c++20
    # --no-build-isolation: an isolated build has no torch, and then leaves the operators out silently.
    if ! PATH=$compiler:$PATH "$python" -m pip install --verbose --disable-pip-version-check --no-build-isolation \
        --constraint "$constraints" "$@" "$MMCV" 2>&1 | tee "$log" |
        grep --line-buffered -oE '^ *\[[0-9]+/[0-9]+\]' |
        while read -r step; do printf '\r   compiling %s' "$step"; done; then
        "$python" -c 'import mmcv' 2> /dev/null || fail "Building mmcv failed, see $log"
    fi
    rm -r "$compiler"
    echo
}
if ! has mmcv._ext; then
    folder=$(wheel_folder)
    say "Looking for a compiled mmcv: $MMCV_WHEELS, $folder"
    mmcv_wheel install "$folder" || echo '   none there for this Python, or no network'
    # Its dependencies, or all of it.
    if has_package onedl-mmcv; then pip_install --constraint "$constraints" 'onedl-mmcv>=2.3.6,<2.4'; fi
fi
has mmcv._ext || build_mmcv
# pip's cache does not know which torch a wheel was compiled for.
has mmcv._ext || build_mmcv --force-reinstall --no-deps --no-cache-dir
has mmcv._ext || fail "mmcv is installed, but its operators do not load: $("$python" -c 'import mmcv._ext' 2>&1 | tail -1)"

say 'Installing mmscalablevit with mmdet, mmseg, mmpretrain and the test tools'
pip_install --constraint "$constraints" --no-build-isolation --editable '.[all,test]'

if ! has cv2; then
    say 'No display library found: taking the headless OpenCV'
    version=$("$python" -m pip show opencv-python-headless | sed -n 's/^Version: //p')
    pip_install --force-reinstall --no-deps "opencv-python-headless==$version"
fi
look mmcv._ext mmdet.models mmseg.models mmpretrain.models
