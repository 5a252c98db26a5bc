#!/usr/bin/env bash
# One run on one node, NPROC_PER_NODE processes; if unset one per GPU, and one where there is none:
#
#   launchers/one_node.sh qwen2_5_math_7b data.data_dir=/data
#
# `megatron-zero train` does the same and checks the settings before it starts processes; this is for
# where a script is wanted. COMMAND=pretrain runs next-token training.
set -euo pipefail

exec "${PYTHON:-python}" -m megatron_zero.node \
  --standalone \
  --nproc-per-node "${NPROC_PER_NODE:-}" \
  --max-restarts "${MAX_RESTARTS:-0}" \
  --log-dir "${LOG_DIR:-${STORAGE:+$STORAGE/}runs/logs}" --tee 3 --local-ranks-filter 0 \
  -m "megatron_zero.${COMMAND:-train}" "$@"
