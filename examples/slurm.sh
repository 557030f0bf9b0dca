#!/usr/bin/env bash
# Train on a SLURM cluster:
#
#   sbatch --nodes=2 examples/slurm.sh --preset gpt2-xl --out_dir runs/xl
#
# Adapt the lines below to your cluster. One task per node: torchrun starts one process per GPU. Submit
# from this repository, on a file system that all nodes share. Submitting the same command again resumes
# the run, and so does a job that SLURM preempts and requeues.
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
# Two minutes before the time limit, SIGTERM makes the run save and stop. If saving takes longer than
# torchrun's 30 seconds, use --time_limit MINUTES instead.
#SBATCH --signal=TERM@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The number of GPUs per node, as 8 or h100:8.
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
