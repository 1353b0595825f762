#!/usr/bin/env bash
# A sweep as an array of jobs, one cell each; the last cell is one less than their number:
#   sbatch --array=0-5 deploy/slurm_sweep.sh --config=configs/digits.py --workdir=/shared/sweeps/digits --grid=optimizer.schedule.peak=1e-3,3e-3 --grid=seed=0,1,2
# Afterwards the same command without the array shows the table: python -m trainer sweep --report --config=...
#SBATCH --job-name=belief-sweep
#SBATCH --ntasks=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

code=0
srun python -m trainer sweep --cell="$SLURM_ARRAY_TASK_ID" "$@" || code=$?

# A SIGTERM came, from a preemption or five minutes before the time limit, and the state is saved: continue in a new job.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
