#!/usr/bin/env bash
# Every node but the first of `vllm_head.sh`, with the same values and NODE_RANK=1, 2, ...
set -euo pipefail

exec vllm serve "$@" \
  --headless \
  --tensor-parallel-size "${GPUS_PER_NODE:-8}" \
  --pipeline-parallel-size "${NNODES:?}" \
  --nnodes "$NNODES" --node-rank "${NODE_RANK:?}" \
  --master-addr "${HEAD_ADDRESS:?}" --master-port "${MASTER_PORT:-29501}" \
  --max-model-len "${MAX_MODEL_LEN:-16384}"
