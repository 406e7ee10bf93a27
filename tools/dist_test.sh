#!/usr/bin/env bash
# Copyright (c) mmscalablevit contributors. All rights reserved.
set -euo pipefail

usage="usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] \\
    $0 CONFIG CHECKPOINT GPUS [arguments of test.py]
example: $0 configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py epoch_12.pth 8"
source "$(dirname "${BASH_SOURCE[0]}")/misc/launch.sh"
need 3 "$@"
check_files "$1" "$2"
GPUS=$3
by_torchrun test.py "$1" "$2" --launcher pytorch "${@:4}"
