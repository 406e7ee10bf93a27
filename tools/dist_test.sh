#!/usr/bin/env bash
# Copyright (c) mmscalablevit contributors. All rights reserved.
set -euo pipefail

usage="usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] \\
    $0 CONFIG CHECKPOINT GPUS [arguments of test.py]
example: $0 configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py epoch_12.pth 8"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "$usage"
    exit
fi
if [[ $# -lt 3 ]]; then
    echo "$usage" >&2
    exit 2
fi
fail() {
    echo "error: $*" >&2
    exit 1
}
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=$1
CHECKPOINT=$2
GPUS=$3
shift 3
[[ -f $CONFIG ]] || fail "config $CONFIG does not exist"
[[ -f $CHECKPOINT || $CHECKPOINT == *://* ]] || fail "checkpoint $CHECKPOINT does not exist"
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "GPUS must be a number, got $GPUS"

PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$GPUS" \
    "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "$@"
