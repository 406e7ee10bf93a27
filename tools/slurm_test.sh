#!/usr/bin/env bash
# Copyright (c) mmscalablevit contributors. All rights reserved.
set -euo pipefail

usage="usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS='...'] \\
    $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
example: GPUS=1 $0 gpu mask-rcnn \\
    configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py epoch_12.pth"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "$usage"
    exit
fi
if [[ $# -lt 4 ]]; then
    echo "$usage" >&2
    exit 2
fi
fail() {
    echo "error: $*" >&2
    exit 1
}
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
CHECKPOINT=$4
shift 4
GPUS=${GPUS:-8}
[[ -f $CONFIG ]] || fail "config $CONFIG does not exist"
[[ -f $CHECKPOINT || $CHECKPOINT == *://* ]] || fail "checkpoint $CHECKPOINT does not exist"
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "GPUS must be a number, got $GPUS"
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
# Several arguments in one variable: split on purpose.
read -r -a SRUN_ARGS <<< "${SRUN_ARGS:-}"

PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" exec srun \
    --partition="$PARTITION" \
    --job-name="$JOB_NAME" \
    --gres="gpu:$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS[@]+"${SRUN_ARGS[@]}"} \
    python -u "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --launcher slurm "$@"
