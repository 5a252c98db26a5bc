#!/usr/bin/env bash
# One run on one node, a process per GPU:
#
#   launchers/one_node.sh qwen2_5_math_7b data.data_dir=/data
#
# `megatron-zero train` does the same and checks the settings before it starts processes; this is for
# where a script is wanted. COMMAND=pretrain runs next-token training.
set -euo pipefail

exec "${PYTHON:-python}" -m megatron_zero.torchrun \
  --standalone \
  --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
  --max-restarts "${MAX_RESTARTS:-0}" \
  --log-dir "${LOG_DIR:-runs/logs}" --tee 3 --local-ranks-filter 0 \
  -m "megatron_zero.${COMMAND:-train}" "$@"
