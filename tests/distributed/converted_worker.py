"""Under torchrun: converted checkpoints read by Megatron in several layouts, exported to HF files.

converted_worker.py DIR:LAYOUT...       LAYOUT: words of tests/layouts.py

DIR/megatron becomes DIR/LAYOUT, an HF checkpoint; of LAYOUT `tp2-pp2` also
DIR/checkpoints/step_000001, a training checkpoint with its optimizer's state.
"""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_zero.config import OptimizerConfig, ParallelConfig
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.hf_dir import read_config
from megatron_zero.convert.safetensors_io import write_hf_checkpoint
from megatron_zero.losses import next_token_objective
from megatron_zero.policy.parallel import Topology, initialize
from tests.layouts import parallel_of


def main() -> None:
    for case in sys.argv[1:]:
        name, text = case.split(":")
        directory, layout = Path(name), parallel_of(text.split("-"))
        topology = initialize(layout, seed=0)
        policy = converted_policy(directory / "megatron", layout, topology)
        tensors = policy.hf_weights(bucket_bytes=50_000)
        if topology.rank == 0:
            write_hf_checkpoint(directory / text, tensors)
        else:
            list(tensors)
        if text == "tp2-pp2":
            from megatron_zero.policy import checkpoint

            checkpoint.save(directory / "checkpoints" / "step_000001", policy, {"step": 1})
        dist.barrier()
    dist.destroy_process_group()


def converted_policy(directory: Path, layout: ParallelConfig, topology: Topology) -> Any:
    """A policy whose weights Megatron itself reads from `directory`."""
    from megatron_zero.policy.model import padded_vocab_size
    from megatron_zero.policy.policy import Policy

    hf_config = read_config(directory)
    return Policy(
        mapping_for(hf_config, padded_vocab_size(hf_config["vocab_size"], topology.tp_size)),
        directory,
        topology,
        parallel=layout,
        optimizer=OptimizerConfig(),
        dtype="bf16",
        objective=next_token_objective,
        num_optimizer_steps=1,
    )


if __name__ == "__main__":
    main()
