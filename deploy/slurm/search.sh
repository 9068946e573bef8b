#!/usr/bin/env bash
# Searches for a recipe on several nodes: a chief on the first node, and one worker per GPU. After a failure or at the time
# limit, the job goes back to the queue and resumes. Edit the numbers and the settings, then run: sbatch deploy/slurm/search.sh
# The guide is docs/guides/many-machines.md.

#SBATCH --job-name=cvt-search
#SBATCH --nodes=2
# One worker (task) per GPU of a node.
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# Five minutes before the time limit, SIGTERM goes to the workers, not to this script. The chief ends two minutes after them.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

# === Settings ===

environment=$HOME/cvt-keras/.venv # with cvt-keras, its extra search and "jax[cuda13]", at the same path on all nodes
restarts=20                       # failures and time limits until the job gives up
search=(
  --dataset folder --data-dir /shared/photos --image-size 64
  --epochs 10 --trials 50
  --search-dir /shared/searches/photos # on a disk that all nodes see
)

# === Job ===

# shellcheck source=/dev/null
source "$environment/bin/activate"
export KERAS_BACKEND=jax
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs can share a node

# This script runs on the first node. The chief trains nothing and leaves the GPUs to the workers.
JAX_PLATFORMS=cpu cvt-keras search "${search[@]}" --chief --address "0.0.0.0:$port" &
chief=$!

# The chief first decodes the images.
until (: <> "/dev/tcp/$SLURMD_NODENAME/$port") 2> /dev/null; do
  kill -0 "$chief" 2> /dev/null || break
  sleep 1
done

# If a worker dies, the others go on with its trial (--kill-on-bad-exit=0).
if kill -0 "$chief" 2> /dev/null; then
  srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --gpu-bind=per_task:1 --kill-on-bad-exit=0 --wait=0 \
    cvt-keras search "${search[@]}" --worker --address "$SLURMD_NODENAME:$port" || true
fi

# The chief ends when all trials have ended, or two minutes after the last worker.
code=0
wait "$chief" || code=$?
if [ "$code" -eq 2 ]; then
  echo "an argument is wrong: the job does not restart" >&2
elif [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
