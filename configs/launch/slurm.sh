#!/usr/bin/env bash
# One stage on several machines under Slurm: one launcher a machine, which starts a process for each GPU.
#
#   sbatch --nodes=2 --gpus-per-node=8 configs/launch/slurm.sh ppo configs/demo/ppo.yaml kl.coef=0.1
#
# Slurm says how many machines there are and which is which (SLURM_NNODES, SLURM_NODEID). SIGTERM comes five minutes
# before the time limit; the same command continues from the last checkpoint.
#SBATCH --job-name=rlhf
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: sbatch $0 STAGE CONFIG [key=value...]" >&2; exit 2; }
stage=$1 config=$2
shift 2
gpus=${SLURM_GPUS_ON_NODE:-8}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts[0]}
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
srun rlhf "$stage" "$config" "$@" --launcher multinode --num-machines "$SLURM_NNODES" \
  --num-processes $((SLURM_NNODES * gpus)) --max-restarts 2 --timeout 1800
