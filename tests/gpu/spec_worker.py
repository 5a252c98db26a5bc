"""Under torchrun, one process: a step with chosen layers; what it computes, to files.

    spec_worker.py DIRECTORY LAYERS:CASE...

LAYERS: transformer_engine or local. CASE: see tests/layouts.py. Weights are those of the checkpoint
DIRECTORY/FAMILY. Float32 means float32: no TF32.
"""

import dataclasses
import os
import sys
from pathlib import Path

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read when cuBLAS is loaded

import torch
import torch.distributed as dist

from megatron_zero.batching import build_global_batch
from megatron_zero.build import packing
from megatron_zero.config import ModelConfig
from megatron_zero.convert.safetensors_io import SafetensorsSource
from megatron_zero.hf_config import read_hf_config
from megatron_zero.policy.parallel import initialize
from tests import tiny
from tests.gpu.layers import use_layers
from tests.invariance.gradient_worker import build, some_steps
from tests.layouts import Case, parse
from tests.parity.logits_worker import captured_logits

CHANGED = 3  # of the packed samples


def neighbours(case: Case, checkpoint: Path) -> dict:
    """How far logprobs move when one sample's prompt changes: its own, and its neighbours'."""
    topology = initialize(case.parallel, seed=0)
    policy = build(
        case.parallel,
        topology,
        hf_config=read_hf_config(ModelConfig(path=str(checkpoint))),
        make_source=lambda mapping: SafetensorsSource(checkpoint),
        dtype=case.dtype,
    )
    samples = tiny.samples()
    prompt = samples[CHANGED].prompt_length
    token_ids = samples[CHANGED].token_ids
    other = tuple((token + 1) % 131 for token in token_ids[:prompt]) + token_ids[prompt:]
    changed = list(samples)
    changed[CHANGED] = dataclasses.replace(samples[CHANGED], token_ids=other)
    moved = {"own": 0.0, "neighbours": 0.0}
    config = tiny.run_config(max_tokens=case.max_tokens)
    packed = packing(case.parallel, topology, case.max_tokens, policy.mapping)
    before, after = (
        policy.with_old_logprobs(build_global_batch(x, config, packed, step=0)).minibatches[0]
        for x in (samples, changed)
    )
    for one, two in zip(before.microbatches, after.microbatches, strict=True):
        assert one.sample_index == two.sample_index
        lengths = one.cu_seqlens.diff().tolist()
        difference = (one.old_logprobs - two.old_logprobs).abs().split(lengths)
        for index, values in zip(one.sample_index, difference, strict=True):
            name = "own" if index == CHANGED else "neighbours"
            moved[name] = max(moved[name], values.max().item())
    order = [index for microbatch in before.microbatches for index in microbatch.sample_index]
    return {"moved": moved, "order": order, "kernels": policy.kernels()}


def main() -> None:
    directory = Path(sys.argv[1])
    for text in sys.argv[2:]:
        layers, words = text.split(":")
        case = parse(words)
        try:
            with use_layers(layers):
                with captured_logits() as logits:
                    result = some_steps(case, directory / case.family)
                result |= {"logits": logits[0], **neighbours(case, directory / case.family)}
        except Exception as error:
            if case.dtype != "fp32" or layers == "local":
                raise
            result = {"refused": str(error)}  # it may have no float32 kernel for packed sequences
        torch.save(result, directory / f"{text}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
