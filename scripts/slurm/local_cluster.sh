#!/usr/bin/env bash
# A SLURM of two nodes on this machine, to try jobs on. Everything of it lies in FOLDER, on the loopback and on free
# ports of its own: a SLURM of the system is not touched, and several may run at once. Needs root, and of Debian:
#   apt-get install slurmctld slurmd slurm-client munge
#
#   eval "$(scripts/slurm/local_cluster.sh start FOLDER)"   # SLURM_CONF: sbatch, squeue ... speak to it
#   scripts/slurm/local_cluster.sh stop FOLDER
set -euo pipefail

usage() {
  echo "usage: $0 start|stop FOLDER" >&2
  exit 2
}
[[ $# == 2 && ($1 == start || $1 == stop) ]] || usage
mkdir -p "$2"
folder=$(cd "$2" && pwd)
export PATH=$PATH:/usr/sbin:/sbin  # where the daemons are
daemons=(slurmd.node2 slurmd.node1 slurmctld munged)

free_ports() { # that nobody listens at; below those that the system hands out itself
  local port=$((10000 + RANDOM % 20000)) found=0
  while ((found < $1)); do
    port=$((port + 1))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      found=$((found + 1))
    fi
  done
}

configure() {
  local ports
  mapfile -t ports < <(free_ports 3)
  cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
# With this line, a job that ends with 75 (stopped by a signal, saved) is put back in the queue by itself, without
# a word in its batch file:
# RequeueExit=75
KillWait=10
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=1
NodeName=node1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=8 RealMemory=1024
NodeName=node2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=8 RealMemory=1024
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  export SLURM_CONF=$folder/slurm.conf
  mkdir -p "$folder/state"
  configure
  head -c 128 /dev/urandom >"$folder/munge.key"
  chmod 600 "$folder/munge.key"
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
  slurmctld -c >&2
  for node in node1 node2; do slurmd -c -N "$node" >&2; done
  for _ in {1..100}; do
    if [[ $(sinfo -h -N -o %T 2>/dev/null | sort | uniq -c | tr -d ' ') == 2idle ]]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.2
  done
  echo "$0: the nodes do not answer; see $folder/*.log" >&2
  stop
  exit 1
}

stop() {
  local name pid
  for name in "${daemons[@]}"; do
    [[ -s $folder/$name.pid ]] || continue
    pid=$(<"$folder/$name.pid")
    kill "$pid" 2>/dev/null || true
    for _ in {1..50}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  done
}

"$1"
