#!/usr/bin/env bash
# Train on the GPUs of two or more nodes: run the same command on each of them.
#
#   FIRST=10.0.0.1 examples/two_nodes.sh --preset gpt2 --out_dir /nfs/runs/sixteen
#
# FIRST is the name or address of the rendezvous node, PORT its port. Any node may become rank 0, which
# writes the run folder: --out_dir must be a shared folder. The text (--input) must be on each node, or in
# a shared folder too.
#
# Without a shared folder, number the nodes: NODE=0 on FIRST, which then writes, NODE=1 on the other.
#
#   FIRST=10.0.0.1 NODE=0 examples/two_nodes.sh --preset gpt2       on 10.0.0.1
#   FIRST=10.0.0.1 NODE=1 examples/two_nodes.sh --preset gpt2       on the other
set -euo pipefail
cd "$(dirname "$0")/.."

: "${FIRST:?set FIRST to the name or address of one of the nodes}"
port=${PORT:-29400}
rendezvous=(--rdzv_backend=c10d --rdzv_endpoint="$FIRST:$port" --rdzv_id="${RUN:-gptforge}")
if [ -n "${NODE:-}" ]; then
  rendezvous=(--node_rank="$NODE" --master_addr="$FIRST" --master_port="$port")
fi

exec torchrun \
  --nnodes="${NODES:-2}" \
  --nproc_per_node="${GPUS:-gpu}" \
  --max_restarts="${RESTARTS:-3}" \
  "${rendezvous[@]}" \
  gpt.py "$@"
