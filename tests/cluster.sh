#!/usr/bin/env bash
# Copyright (c) mmscalablevit contributors. All rights reserved.
# Two hosts in network namespaces of this machine, joined by one cable, and Slurm on both.
set -euo pipefail

usage="usage: $0 up NAME            make the hosts n1 (10.77.0.1) and n2 (10.77.0.2)
       $0 run NAME HOST COMMAND...  run a command on n1 or n2
       $0 cut|mend NAME      take the link between them down, or up again
       $0 slurm NAME DIR     start Slurm with partition 'cpu'; its files go to DIR
       $0 down NAME          end all that runs on the hosts, and remove them
Needs root and iproute2; for Slurm munge, slurmctld, slurmd and slurm-client. Nothing of it is
reached from outside, nor reaches there."
if [[ $# -lt 2 ]]; then
    echo "$usage" >&2
    exit 2
fi
ACTION=$1
NAME=$2
shift 2

on() {
    # As ip netns exec does it, but with a name of the host's own, and with the cgroups in /sys.
    nsenter --net="/run/netns/$NAME-$1" unshare --uts --mount bash -c \
        'hostname "$0" && mount --bind "$1" /etc/hosts && exec "${@:2}"' \
        "$1" "/run/$NAME.hosts" "${@:2}"
}

up() {
    printf '%s\n' '127.0.0.1 localhost' '10.77.0.1 n1' '10.77.0.2 n2' > "/run/$NAME.hosts"
    ip netns add "$NAME-n1"
    ip netns add "$NAME-n2"
    ip link add eth0 netns "$NAME-n1" type veth peer name eth0 netns "$NAME-n2"
    for i in 1 2; do
        ip -n "$NAME-n$i" address add "10.77.0.$i/24" dev eth0
        ip -n "$NAME-n$i" link set lo up
        ip -n "$NAME-n$i" link set eth0 up
    done
}

down() {
    for i in 1 2; do
        [[ -e /run/netns/$NAME-n$i ]] || continue
        ip netns pids "$NAME-n$i" | xargs --no-run-if-empty kill -KILL 2> /dev/null || true
        ip netns del "$NAME-n$i"
    done
    rm -f "/run/$NAME.hosts"
}

slurm() {
    local dir
    mkdir -p "$1"/{state,spool.n1,spool.n2}
    dir=$(cd "$1" && pwd)
    (umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
    cat > "$dir/slurm.conf" << EOF
ClusterName=test
SlurmctldHost=n1(10.77.0.1)
SlurmUser=root
AuthInfo=socket=$dir/munge.socket,cred_expire=15
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/spool.%n
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=10.77.0.1 CPUs=4
NodeName=n2 NodeAddr=10.77.0.2 CPUs=4
PartitionName=cpu Nodes=n1,n2 Default=YES State=UP
EOF
    # A requeued job waits for cred_expire, by default two minutes.
    # Sockets are reached through the file system, so one munge serves both hosts.
    on n1 munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
        --pid-file="$dir/munge.pid" --log-file="$dir/munge.log" --seed-file="$dir/munge.seed"
    on n1 slurmctld -f "$dir/slurm.conf"
    on n1 slurmd -f "$dir/slurm.conf"
    on n2 slurmd -f "$dir/slurm.conf"
    for _ in {1..100}; do
        # Both idle: they have registered.
        [[ $(on n1 env SLURM_CONF="$dir/slurm.conf" sinfo -h -o '%D %t') == '2 idle' ]] && return
        sleep 0.2
    done
    tail -n 5 "$dir"/*.log >&2
    return 1
}

case $ACTION in
    up) up ;;
    run) on "$@" ;;
    cut) ip -n "$NAME-n1" link set eth0 down ;;
    mend) ip -n "$NAME-n1" link set eth0 up ;;
    slurm) slurm "$1" ;;
    down) down ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
