#!/usr/bin/env bash
# One stage on the machines of a DeepSpeed hostfile, started over ssh. Each machine has this folder at the same path.
#
#   bash configs/launch/hosts.sh configs/launch/hostfile ppo configs/demo/ppo.yaml kl.coef=0.1
#
# No variable of this shell goes along: DeepSpeed's own launchers write all of them, tokens included, to .deepspeed_env.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: bash $0 HOSTFILE STAGE CONFIG [key=value...]" >&2; exit 2; }
hostfile=$1
shift
hosts=() processes=0
while read -r host slots _; do
  case $host in '' | '#'*) continue ;; esac
  case $slots in slots=*) ;; *) echo "$hostfile: expected 'HOST slots=N', got '$host $slots'" >&2; exit 2 ;; esac
  hosts+=("$host")
  processes=$((processes + ${slots#slots=}))
done <"$hostfile"
[ ${#hosts[@]} -ge 1 ] || { echo "$hostfile: no host" >&2; exit 2; }
arguments=$(printf '%q ' "$@")
pids=()
for rank in "${!hosts[@]}"; do
  ssh "${hosts[$rank]}" "cd $(printf %q "$PWD") && ${RLHF:-rlhf} $arguments --launcher multinode" \
    "--num-machines ${#hosts[@]} --num-processes $processes --machine-rank $rank --main-process-ip ${hosts[0]}" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
