#!/usr/bin/env bash
# DeepSeek-V3-Base, DeepSeek-R1-Zero or any other model on several nodes, with an OpenAI-compatible
# endpoint on this one, the first:
#
#   NNODES=2 HEAD_ADDRESS=10.0.0.1 launchers/serving/vllm_head.sh deepseek-ai/DeepSeek-V3-Base
#   NNODES=2 HEAD_ADDRESS=10.0.0.1 NODE_RANK=1 launchers/serving/vllm_worker.sh deepseek-ai/...
#
# TP spans a node's GPUs and PP the nodes. The published weights have 8 bits: two nodes of 8 x 80 GB
# hold them. In bf16 (a converted checkpoint) it takes four of 8 x 80 GB. Other arguments are vLLM's.
set -euo pipefail

exec vllm serve "$@" \
  --host 0.0.0.0 --port "${PORT:-8000}" \
  --tensor-parallel-size "${GPUS_PER_NODE:-8}" \
  --pipeline-parallel-size "${NNODES:?}" \
  --nnodes "$NNODES" --node-rank 0 \
  --master-addr "${HEAD_ADDRESS:?}" --master-port "${MASTER_PORT:-29501}" \
  --max-model-len "${MAX_MODEL_LEN:-16384}"
