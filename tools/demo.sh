#!/usr/bin/env bash
# Copyright (c) mmscalablevit contributors. All rights reserved.
# Trains and evaluates a detector and a segmentor on a data set made here, and draws the results.
# An interrupted run continues where it was; a finished one is only reported again.
set -euo pipefail

usage="usage: $0 [WORK_DIR]
example: $0 work_dirs/demo"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "$usage"
    exit
fi
if [[ $# -gt 1 || ${1:-} == -* ]]; then
    echo "$usage" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WORK_DIR=${1:-work_dirs/demo}
PYTHON=${PYTHON:-python}
DATA=data/shapes

# Both trainings run side by side on half of the cores each: on small images two processes of one
# thread are faster than one process of two threads after the other.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 1) / 2))}

train() {
    local name=$1 config=$2 dir=$WORK_DIR/$1
    if [[ -f $dir/finished ]]; then
        echo "[$name] finished before; remove $dir to train again"
        return
    fi
    mkdir -p "$dir"
    local resume=()
    [[ -f $dir/last_checkpoint ]] && resume=(--resume)
    if ! "$PYTHON" tools/train.py "$config" --work-dir "$dir" ${resume[@]+"${resume[@]}"} 2>&1 |
        tee "$dir/output.log" |
        { grep --line-buffered -E 'Iter\(train\)|Iter\(val\).*(mIoU|mAP)|resumed from|^error' || true; } |
        sed -u -E "s/^.*(Iter\(|resumed|error)/[$name] \1/; s/(base_lr|lr|data_time|memory|grad_norm): [^ ]+ +//g"; then
        echo "[$name] training failed, the end of $dir/output.log:" >&2
        tail -n 20 "$dir/output.log" >&2
        return 1
    fi
    touch "$dir/finished"
}

"$PYTHON" demo/shapes.py "$DATA" --num-train 4000 --num-val 100
echo "Training a detector and a segmentor side by side, about 10 minutes on 2 cores"
trap 'trap - INT TERM; kill 0' INT TERM
train detection configs/demo/mask-rcnn_scalablevit-demo_fpn_shapes.py &
detection=$!
train segmentation configs/demo/scalablevit-demo_upernet_shapes-128x128.py &
segmentation=$!
failed=0
wait "$detection" || failed=1
wait "$segmentation" || failed=1
[[ $failed -eq 0 ]] || exit 1
trap - INT TERM

"$PYTHON" demo/report.py --det-dir "$WORK_DIR/detection" \
    --seg-dir "$WORK_DIR/segmentation" --data "$DATA" --out-dir "$WORK_DIR"
