#!/usr/bin/env bash
# A Slurm of one node with one made-up GPU, for tests, on this machine.
#
#   tests/slurm/cluster.sh up DIR      start it; DIR holds its configuration, state and logs
#   tests/slurm/cluster.sh down DIR    stop it; DIR stays, for its logs
#
# Reach it with DIR/bin first on the PATH: Slurm's commands there know its configuration. Both calls may be
# repeated. It wants root, but neither systemd nor cgroups, and writes nothing outside DIR but the packages
# that `up` installs where they are missing.
set -euo pipefail

PATH=$PATH:/usr/sbin # where Debian puts the daemons, and not every root looks
PACKAGES=(slurmctld slurmd slurm-client munge)
TIMEOUT_S=30

fail() {
    echo "error: $*" >&2
    exit 1
}

require_tools() {
    local tool missing=""
    for tool in slurmctld slurmd scontrol sbatch munged mungekey; do
        command -v "$tool" >/dev/null || missing+=" $tool"
    done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null ||
        fail "not installed:$missing. Install Slurm and munge with this system's package manager."
    echo "installing ${PACKAGES[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends "${PACKAGES[@]}"; } \
        >"$DIR/install.log" 2>&1 ||
        fail "could not install ${PACKAGES[*]}; see $DIR/install.log. Install them by hand and try again."
}

free_ports() { # two TCP ports that nothing listens on
    python3 - <<'PYTHON'
import socket

sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PYTHON
}

# CPUs and memory are what the workflow's rules ask for, not what the machine has: with config_overrides
# slurmd takes the file's word. One GPU, so that two GPU jobs must wait for each other.
write_configuration() {
    local host ports
    host=$(uname -n)
    host=${host%%.*}
    read -r -a ports < <(free_ports)
    cat >"$DIR/slurm.conf" <<CONF
ClusterName=kvbench
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=16 RealMemory=262144 Gres=gpu:1 State=UNKNOWN
PartitionName=gpu Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    echo "Name=gpu File=/dev/null" >"$DIR/gres.conf"
}

# Commands and not a variable, because the Slurm plugin drops SLURM_CONF from the environment of a job's srun.
write_commands() {
    local tool
    mkdir -p "$DIR/bin"
    for tool in sbatch scancel scontrol sinfo squeue srun; do
        printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$(command -v $tool)" >"$DIR/bin/$tool"
        chmod +x "$DIR/bin/$tool"
    done
}

pid_of() { # the process id of one of our daemons, when it runs (one that ended unreaped has no command line)
    local pid
    pid=$(cat "$DIR/$1.pid" 2>/dev/null) || return 1
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] && grep -q . "/proc/$pid/cmdline" && echo "$pid"
}

wait_for() { # a condition, by name and arguments
    local end=$((SECONDS + TIMEOUT_S))
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.2
    done
}

node_is_idle() { sinfo --noheader --format=%T 2>/dev/null | grep -qx idle; }
nothing_is_queued() { [ -z "$(squeue --noheader 2>/dev/null)" ]; }
has_stopped() { ! pid_of "$1" >/dev/null; }

up() {
    mkdir -p "$DIR/state" "$DIR/spool"
    chmod 755 "$DIR"
    require_tools
    [ ${#DIR} -le 90 ] || fail "$DIR is too long for a socket in it. Give a folder of at most 90 characters."
    if has_stopped munged || has_stopped slurmctld || has_stopped slurmd; then
        down
        start
    fi
    echo "up: put $DIR/bin first on the PATH"
}

start() {
    write_configuration
    write_commands
    [ -f "$DIR/munge.key" ] || mungekey --create --keyfile="$DIR/munge.key"
    # --force: the folders above DIR may be closed to other users, whom this cluster does not serve.
    munged --force --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --pid-file="$DIR/munged.pid" \
        --log-file="$DIR/munged.log" --seed-file="$DIR/munged.seed" 2>>"$DIR/munged.log"
    slurmctld -c
    slurmd
    wait_for node_is_idle ||
        fail "the node is not ready after $TIMEOUT_S s; see slurmctld.log and slurmd.log in $DIR."
}

down() {
    local daemon pid
    if pid_of slurmctld >/dev/null; then
        scancel --user=root 2>/dev/null || true
        wait_for nothing_is_queued || echo "warning: jobs are left in the queue" >&2
    fi
    for daemon in slurmd slurmctld munged; do
        pid=$(pid_of "$daemon") || continue
        kill "$pid"
        wait_for has_stopped "$daemon" || kill -KILL "$pid"
    done
    rm -f "$DIR"/*.pid "$DIR"/munge.socket*
}

[ $# -eq 2 ] || fail "usage: $0 up|down DIR"
case $1 in up | down) ;; *) fail "usage: $0 up|down DIR" ;; esac
[ "$(id -u)" -eq 0 ] || fail "Slurm's daemons start jobs as other users. Run this as root, in a container at best."
[ "$1" = down ] || mkdir -p "$2"
[ -d "$2" ] || exit 0
DIR=$(cd "$2" && pwd)
export SLURM_CONF=$DIR/slurm.conf
"$1"
