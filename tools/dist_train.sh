#!/usr/bin/env bash
# Copyright (c) mmscalablevit contributors. All rights reserved.
set -euo pipefail

usage="usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] \\
    $0 CONFIG GPUS [arguments of train.py]
example: $0 configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py 8 --amp"
source "$(dirname "${BASH_SOURCE[0]}")/misc/launch.sh"
need 2 "$@"
check_files "$1"
GPUS=$2
by_torchrun train.py "$1" --launcher pytorch "${@:3}"
