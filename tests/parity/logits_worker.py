"""Under torchrun: the policy's whole logits on a fixed batch in several layouts, to files.

logits_worker.py OUT_DIR HF_DIR LAYOUT...       LAYOUT: tp.pp.sp
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_zero.batching import build_microbatch
from megatron_zero.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_zero.convert.families import family_for
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.safetensors_io import SafetensorsSource
from megatron_zero.hf_config import read_hf_config
from megatron_zero.policy.parallel import initialize
from tests import tiny


def main() -> None:
    out, hf_dir, *layouts = sys.argv[1:]
    for text in layouts:
        tp, pp, sp = map(int, text.split("."))
        layout = ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=bool(sp),
        )
        topology = initialize(layout, seed=0)
        from megatron_zero.policy import forward
        from megatron_zero.policy.model import PolicyModel, padded_vocab_size
        from megatron_zero.policy.policy import Policy

        hf_config = read_hf_config(ModelConfig(path=hf_dir))
        padded = padded_vocab_size(hf_config["vocab_size"], tp)
        policy = Policy(
            hf_config,
            Mapping(family_for(hf_config), hf_config, padded),
            SafetensorsSource(hf_dir),
            topology,
            parallel=layout,
            optimizer=OptimizerConfig(),
            dtype="fp32",
            objective=forward.next_token_objective,
            num_optimizer_steps=1,
        )
        captured = []
        compute = PolicyModel._logits

        def capture(self, *args, compute=compute, captured=captured):
            logits = compute(self, *args)
            parts = [torch.empty_like(logits) for _ in range(self.pg_collection.tp.size())]
            dist.all_gather(parts, logits.contiguous(), group=self.pg_collection.tp)
            captured.append(torch.cat(parts, -1)[:, : self.real_vocab_size])
            return logits

        PolicyModel._logits = capture
        samples = tiny.samples()
        microbatch = build_microbatch(samples, range(len(samples)), alignment=tp if sp else 1)
        forward.forward_logprobs(policy.ddp_model, [microbatch])
        PolicyModel._logits = compute
        if topology.is_last_stage and topology.tp_rank == 0 and topology.dp_rank == 0:
            torch.save(captured[0], Path(out) / f"{text}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
