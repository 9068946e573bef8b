#!/usr/bin/env bash
# Trains on several nodes with one process per GPU. After a failure or at the time limit, the job goes back to the queue, and
# resumes after the last finished epoch. Edit the numbers and the settings, then run: sbatch deploy/slurm/train.sh
# The guide is docs/guides/many-machines.md.

#SBATCH --job-name=cvt-train
#SBATCH --nodes=2
# One process (task) per GPU of a node.
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# Three minutes before the time limit, SIGTERM goes to the processes, not to this script.
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

# === Settings ===

environment=$HOME/cvt-keras/.venv # with cvt-keras and "jax[cuda13]", at the same path on all nodes
restarts=20                       # failures and time limits until the job gives up
training=(
  --variant cvt_13
  --dataset folder --data-dir /shared/photos --image-size 224
  --epochs 90 --batch-size 512 # images per step of all GPUs together: a multiple of their number
  --run-dir /shared/runs/photos # on a disk that all nodes see
)

# === Job ===

# shellcheck source=/dev/null
source "$environment/bin/activate"
export KERAS_BACKEND=jax

# srun returns the highest exit code, and the processes that it ends have 143 or 137. So 2, a wrong argument, becomes 254.
# shellcheck disable=SC2016
process='trap : TERM; "$@"; code=$?; exit $((code == 2 ? 254 : code))'

# JAX reads the coordinator and the number of processes from Slurm. It gives each process the GPU of its local rank, so each
# must see all GPUs of its node (--gpu-bind=none). Process 0 tests after the others have ended (--wait=0).
code=0
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --gpu-bind=none --kill-on-bad-exit=1 --wait=0 \
  bash -c "$process" process cvt-keras train "${training[@]}" --resume || code=$?

if [ "$code" -eq 254 ]; then
  echo "an argument is wrong: the job does not restart" >&2
  exit 2
fi
if [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
