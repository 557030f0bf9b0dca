#!/usr/bin/env bash
# Train on a SLURM cluster:
#
#   sbatch --nodes=2 examples/slurm.sh --preset gpt2-xl --out_dir runs/xl
#
# Change the lines below to what your cluster calls things. One task a machine: torchrun starts a process
# a GPU. Submit from this repository, on a file system that all machines see. The same command submitted
# again goes on with the run, and so does a job that SLURM has taken off and queued anew.
#
#SBATCH --job-name=gptforge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Two minutes before the time is up the run is asked to save and stop. A model that takes longer than
# torchrun's 30 seconds to save is stopped in time by --time_limit MINUTES instead.
#SBATCH --signal=TERM@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# SLURM says how many GPUs a machine gave, in one of two forms: 8 or h100:8.
gpus=${SLURM_GPUS_PER_NODE:-gpu}
gpus=${gpus##*:}

exec srun torchrun \
  --nnodes="$SLURM_NNODES" \
  --nproc_per_node="$gpus" \
  --max_restarts="${RESTARTS:-3}" \
  --rdzv_backend=c10d \
  --rdzv_endpoint="$first:${PORT:-29400}" \
  --rdzv_id="$SLURM_JOB_ID" \
  gpt.py "$@"
