#!/usr/bin/env bash
# Train on all GPUs of this machine. Flags are those of gpt.py:
#
#   examples/one_node.sh --preset gpt2 --out_dir runs/eight
#   GPUS=2 examples/one_node.sh --preset gpt2-xl
#   GPUS=2 examples/one_node.sh --preset debug --device cpu       without a GPU, to see that it works
#
# A rank that is lost ends all of them; torchrun starts them again, and the run goes on from its last
# checkpoint, RESTARTS times at most.
set -euo pipefail
cd "$(dirname "$0")/.."

exec torchrun \
  --standalone \
  --nproc_per_node="${GPUS:-gpu}" \
  --max_restarts="${RESTARTS:-3}" \
  gpt.py "$@"
