#!/usr/bin/env bash
# A run with one process on each node; JAX finds the processes by Slurm's own variables:
#   sbatch --nodes=4 deploy/slurm.sh --config=configs/linux_110m.py --workdir=/shared/runs/linux_110m
#SBATCH --job-name=belief
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# After the first process has ended, the others get two minutes to end by themselves: they may still be saving.
code=0
srun --wait=120 python -m trainer train "$@" || code=$?

# A SIGTERM came, from a preemption or five minutes before the time limit, and the state is saved: continue in a new job.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
