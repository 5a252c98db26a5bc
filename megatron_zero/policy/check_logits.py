"""Logits of a converted checkpoint by Megatron against the original's by transformers.

    python -m megatron_zero.policy.check_logits HF_DIR MEGATRON_DIR [--dtype bf16|fp32|keep]

One process, float32, a fixed batch of random tokens. The exit status is 1 when the largest
difference exceeds 1e-5 of the largest logit.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_zero.batching import Packing, build_document_minibatch
from megatron_zero.config import ParallelConfig
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.hf_dir import read_config
from megatron_zero.convert.stored import folder_corrections
from megatron_zero.policy.parallel import initialize

Documents = list[tuple[int, ...]]  # all of the same length
BOUND = 1e-5
_DOCUMENTS, _TOKENS = 2, 48


def hf_logits(directory: Path, documents: Documents, *, rounded: bool) -> torch.Tensor:
    """[documents * (tokens - 1), vocabulary], with weights rounded to bf16 first if told."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if rounded else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).float().eval()
    with torch.no_grad():
        ids = torch.tensor(documents)[:, :-1]
        logits: torch.Tensor = model(ids).logits
    return logits.flatten(0, 1)


def megatron_logits(
    directory: Path, hf_config: dict[str, Any], documents: Documents, *, rounded: bool
) -> torch.Tensor:
    """The same of a distributed checkpoint, read by Megatron itself."""
    topology = initialize(ParallelConfig(), seed=0)
    from megatron.core import dist_checkpointing

    from megatron_zero.policy.forward import forward_logprobs
    from megatron_zero.policy.model import build_chunks, layer_implementation
    from megatron_zero.policy.model_config import transformer_config

    mapping = mapping_for(hf_config, with_mtp=False)
    with_te = layer_implementation() == "transformer_engine"
    config = transformer_config(mapping, ParallelConfig(), torch.float32, with_te=with_te)
    (model,) = build_chunks(config, mapping, topology)
    content = dist_checkpointing.load_content_metadata(str(directory)) or {}
    metadata = {"dp_cp_group": topology.dp_cp_group, "non_homogeneous_layers": False, **content}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    model.load_state_dict(dist_checkpointing.load(state, str(directory))["model"])
    if rounded:
        model.to(torch.bfloat16).to(torch.float32)
    captured = []
    inputs = model._output_layer_inputs

    def capture(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        captured.append(inputs(*args))
        return captured[-1]

    model._output_layer_inputs = capture
    packing = Packing(dp_rank=0, dp_size=1, max_tokens=_DOCUMENTS * _TOKENS)
    minibatch = build_document_minibatch([documents], packing)
    forward_logprobs([model], minibatch.microbatches, topology)
    hidden, weight = captured[0]
    return (hidden @ weight.t())[:, : hf_config["vocab_size"]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf", type=Path, metavar="HF_DIR")
    parser.add_argument("megatron", type=Path, metavar="MEGATRON_DIR")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "keep"), default="keep")
    options = parser.parse_args()
    hf_config = read_config(options.hf)
    hf_config |= folder_corrections(hf_config, options.hf).fields
    rng = random.Random(0)
    vocabulary = range(hf_config["vocab_size"])
    documents = [tuple(rng.choice(vocabulary) for _ in range(_TOKENS)) for _ in range(_DOCUMENTS)]
    rounded = options.dtype == "bf16"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    logits = megatron_logits(options.megatron, hf_config, documents, rounded=rounded)
    expected = hf_logits(options.hf, documents, rounded=rounded)
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    print(f"logits: largest relative difference {difference:.1e}, bound {BOUND:.0e}")
    return 0 if difference <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
