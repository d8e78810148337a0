#!/bin/bash
# The sbatch script of docs/several-processes.md, on two nodes of a Slurm of its own: sudo scripts/try_slurm.sh PYTHON
#
# Each node is a network and a host name of its own on this computer (namespaces), so that what the processes say to
# each other goes through addresses, as between computers. Needs root and Debian's slurm-wlm, munge and iproute2.
# Ends with 0, after some four minutes, if a job was asked to stop before its time was over, said so, left last.pt, and
# a second one went on to the end of the run.
set -euo pipefail
python=$(readlink -f "$(dirname "$(command -v "${1:?usage: try_slurm.sh PYTHON}")")")/python
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
nodes=(node0 node1)
cleanup() {
    [ $? -eq 0 ] || tail -n 5 "$work"/*.log
    set +e
    [ -f "$work/slurmctld.pid" ] && kill "$(cat "$work/slurmctld.pid")"
    for node in "${nodes[@]}"; do
        [ -f "$work/$node.pid" ] && kill "$(cat "$work/$node.pid")"
        ip netns delete "$node"
    done
    ip link delete slurm0
    sed -i '/# try_slurm$/d' /etc/hosts
    rm -rf "$work"
} 2>/dev/null
trap cleanup EXIT

# ---- two nodes --------------------------------------------------------------------------------------
ip link add slurm0 type bridge
ip address add 10.213.7.254/24 dev slurm0
ip link set slurm0 up
echo "10.213.7.254 head # try_slurm" >>/etc/hosts
for i in 0 1; do
    node=${nodes[i]}
    ip netns add "$node"
    ip link add "v$node" type veth peer name eth0 netns "$node"
    ip link set "v$node" master slurm0 up
    ip -n "$node" address add "10.213.7.$((i + 1))/24" dev eth0
    ip -n "$node" link set eth0 up
    ip -n "$node" link set lo up
    echo "10.213.7.$((i + 1)) $node # try_slurm" >>/etc/hosts
done

# ---- Slurm ------------------------------------------------------------------------------------------
pgrep -x munged >/dev/null || { mkdir -p /run/munge && chown munge: /run/munge && runuser -u munge -- munged; }
export SLURM_CONF=$work/slurm.conf
mkdir "$work/state"
cat >"$SLURM_CONF" <<CONF
ClusterName=here
SlurmctldHost=head(10.213.7.254)
SlurmUser=root
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
SchedulerParameters=sched_interval=2
NodeName=node[0-1] CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
unshare --uts bash -c 'hostname head && exec slurmctld'
for node in "${nodes[@]}"; do
    mkdir "$work/$node"
    nsenter --net="/run/netns/$node" unshare --uts bash -c "hostname $node && exec slurmd"
done
for _ in $(seq 60); do
    [ "$(sinfo -h -o %t | sort -u)" = idle ] && break
    sleep 1
done
sinfo

# ---- the script of the documentation, with no GPU and a short time ------------------------------------
cd "$work"
sed -n '/^#!\/bin\/bash$/,/^```$/p' "$root/docs/several-processes.md" | sed '/^```$/d' |
    sed -e '/gpus-per-node/d' -e "s/cpus-per-task=16/cpus-per-task=1/" -e "s/time=24:00:00/time=3/" \
        -e "s/TERM@120/TERM@60/" -e 's/--nproc-per-node 4/--nproc-per-node 1/' -e 's/--workers 3/--workers 1/' \
        -e "s|--data /shared/DIR|--data sample --meta-fraction 0.1 --epochs 12 --batch-size 8 --device cpu|" -e "s|/shared/|$work/|" >run.sbatch
sed -n '/^srun/,$p' run.sbatch
sed -e '/srun/,$d' -e 's/time=.*/time=30/' run.sbatch >resume.sbatch
sed -n '/^srun/,$p' run.sbatch | sed -e "s|train .*|train --resume $work/runs/mcpm|" -e '/--out/d' >>resume.sbatch
cat resume.sbatch

# ---- one job that is stopped, one that goes on --------------------------------------------------------
export PATH="$(dirname "$python"):$PATH" PYTHONPATH="$root" OMP_NUM_THREADS=1
state() { scontrol show job "$1" | grep -o 'JobState=[A-Z]*\|ExitCode=[0-9:]*' | tr '\n' ' '; }
finished() { # job: waits for its end and shows what it printed
    while squeue -h -j "$1" 2>/dev/null | grep -q .; do sleep 2; done
    tail -n 20 "slurm-$1.out"
    state "$1"
    echo
}
job=$(sbatch --parsable run.sbatch)
finished "$job"
grep -q "interrupted; noisyseg train --resume" "slurm-$job.out"
test -f runs/mcpm/last.pt
[ ! -f runs/mcpm/report.html ]
job=$(sbatch --parsable resume.sbatch)
finished "$job"
test -f runs/mcpm/report.html
echo "one job stopped, one went on to the end"
