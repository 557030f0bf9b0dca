#!/usr/bin/env bash
# Train on all GPUs of this machine. Takes the flags of gpt.py:
#
#   examples/one_node.sh --preset gpt2 --out_dir runs/eight
#   GPUS=2 examples/one_node.sh --preset gpt2-xl
#   GPUS=2 examples/one_node.sh --preset debug --device cpu       try it without a GPU
#
# If a rank fails, torchrun restarts all of them, at most RESTARTS times, and the run resumes from its
# last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

exec torchrun \
  --standalone \
  --nproc_per_node="${GPUS:-gpu}" \
  --max_restarts="${RESTARTS:-3}" \
  gpt.py "$@"
