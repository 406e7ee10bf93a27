#!/usr/bin/env bash
# Copyright (c) mmscalablevit contributors. All rights reserved.
set -euo pipefail

usage="usage: [GPUS=8 GPUS_PER_NODE=8 GRES=gpu:8 CPUS_PER_TASK=5 SRUN_ARGS='...'] \\
    $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
GPUS is the number of processes; with an empty GRES they run on CPUs.
example: GPUS=1 $0 gpu mask-rcnn \\
    configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py epoch_12.pth"
source "$(dirname "${BASH_SOURCE[0]}")/misc/launch.sh"
need 4 "$@"
check_files "$3" "$4"
PARTITION=$1 JOB_NAME=$2
by_srun test.py "$3" "$4" --launcher slurm "${@:5}"
