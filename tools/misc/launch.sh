# Copyright (c) mmscalablevit contributors. All rights reserved.
# What dist_*.sh and slurm_*.sh share; they set `usage`.

fail() {
    echo "error: $*" >&2
    exit 1
}

# need NUMBER ARGUMENTS: shows the usage where it is asked for, or where arguments are missing.
need() {
    if [[ ${2:-} == -h || ${2:-} == --help ]]; then
        echo "$usage"
        exit
    fi
    if [[ $# -le $1 ]]; then
        echo "$usage" >&2
        exit 2
    fi
}

check_files() {
    [[ -f $1 ]] || fail "config $1 does not exist"
    [[ $# -eq 1 || -f $2 || $2 == *://* ]] || fail "checkpoint $2 does not exist"
}

check_gpus() {
    [[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "GPUS must be a number, got $GPUS"
}

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"

# by_torchrun TOOL ARGUMENTS: runs a tool as GPUS processes on this machine, one of NNODES.
by_torchrun() {
    check_gpus
    [[ ${NNODES:-1} -eq 1 || -n ${MASTER_ADDR:-} ]] ||
        fail "NNODES=$NNODES needs MASTER_ADDR, the address of the machine with NODE_RANK=0"
    exec python -m torch.distributed.run \
        --nnodes="${NNODES:-1}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="${PORT:-29500}" \
        --nproc_per_node="$GPUS" \
        "$TOOLS/$1" "${@:2}"
}

# by_srun TOOL ARGUMENTS: runs a tool as GPUS processes in the Slurm partition PARTITION.
by_srun() {
    GPUS=${GPUS:-8}
    check_gpus
    local per_node=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))} more
    local gres=${GRES-gpu:$per_node}
    # Several arguments in one variable: split on purpose.
    read -r -a more <<< "${SRUN_ARGS:-}"
    # Jobs may share a node.
    export MASTER_PORT=${PORT:-$((20000 + RANDOM % 10000))}
    exec srun \
        --partition="$PARTITION" \
        --job-name="$JOB_NAME" \
        ${gres:+--gres="$gres"} \
        --ntasks="$GPUS" \
        --ntasks-per-node="$per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        ${more[@]+"${more[@]}"} \
        python -u "$TOOLS/$1" "${@:2}"
}
