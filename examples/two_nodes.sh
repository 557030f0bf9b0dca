#!/usr/bin/env bash
# Train on the GPUs of two machines or more: the same line on each of them.
#
#   FIRST=10.0.0.1 examples/two_nodes.sh --preset gpt2 --out_dir /nfs/runs/sixteen
#
# FIRST is the name or address of one of them, where they meet, on port PORT. Which machine becomes
# rank 0, and so writes the run folder, is not known beforehand: --out_dir has to be a folder that both
# see. The text (--input) has to lie on each, or in such a folder too.
#
# Without a shared folder, number the machines: NODE=0 on FIRST, which then writes, NODE=1 on the other.
#
#   FIRST=10.0.0.1 NODE=0 examples/two_nodes.sh --preset gpt2       on 10.0.0.1
#   FIRST=10.0.0.1 NODE=1 examples/two_nodes.sh --preset gpt2       on the other
set -euo pipefail
cd "$(dirname "$0")/.."

: "${FIRST:?give FIRST, the name or address of one of the machines}"
port=${PORT:-29400}
meeting=(--rdzv_backend=c10d --rdzv_endpoint="$FIRST:$port" --rdzv_id="${RUN:-gptforge}")
if [ -n "${NODE:-}" ]; then
  meeting=(--node_rank="$NODE" --master_addr="$FIRST" --master_port="$port")
fi

exec torchrun \
  --nnodes="${NODES:-2}" \
  --nproc_per_node="${GPUS:-gpu}" \
  --max_restarts="${RESTARTS:-3}" \
  "${meeting[@]}" \
  gpt.py "$@"
