#!/usr/bin/env bash
# One run on several nodes: start this on every node, with the same values and arguments.
#
#   NNODES=4 HEAD_NODE=node0 launchers/many_nodes.sh qwen3_30b_a3b data.data_dir=/data --resume
#
#   NNODES          nodes of the job
#   HEAD_NODE       name or address of one of them, where the nodes meet; it must resolve on all
#   NPROC_PER_NODE  processes of a node; if unset one per GPU, and one where there is no GPU
#   RDZV_PORT       port on the head node (29500)
#   JOB_ID          any word, the same on all nodes, another for every job on the same port
#   NODE_ADDRESS    this node's address, where its own name does not resolve to one that others reach
#   MAX_RESTARTS    times that all processes are started again after a failure (0: the job ends). With
#                   `--resume` among the arguments each start goes on from the last checkpoint
#   LOG_DIR         stdout and stderr of every rank; the console has the first rank of each node
#   COMMAND         train or pretrain
#   HEAD_TIMEOUT_S  how long a node waits until the head node is there (45)
#   JOIN_TIMEOUT_S  how long the nodes wait until all of them are there (600)
#   STORAGE         folder that outlives the job: a relative runs_dir is one of it, and a run that
#                   would write elsewhere is refused
#
# What is wrong is said in one sentence, within a minute: a setting, a port that something else has,
# a head node that cannot be reached.
#
# The run directory (runs_dir) and the model must be on storage that all nodes share. A node that is
# not heard of for parallel.max_host_silence_s ends the job, with its name.
set -euo pipefail

exec "${PYTHON:-python}" -m megatron_zero.node \
  --nnodes "${NNODES:?}" \
  --nproc-per-node "${NPROC_PER_NODE:-}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD_NODE:?}:${RDZV_PORT:-29500}" \
  --rdzv-id "${JOB_ID:-megatron_zero}" \
  --rdzv-conf "join_timeout=${JOIN_TIMEOUT_S:-600},read_timeout=20" \
  ${NODE_ADDRESS:+--local-addr="$NODE_ADDRESS"} \
  --max-restarts "${MAX_RESTARTS:-0}" \
  --log-dir "${LOG_DIR:-${STORAGE:+$STORAGE/}runs/logs}" --tee 3 --local-ranks-filter 0 \
  -m "megatron_zero.${COMMAND:-train}" "$@"
