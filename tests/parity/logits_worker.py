"""Under torchrun: load tiny models in several layouts; their logits and their export, to files.

logits_worker.py DIRECTORY NAME:LAYOUT...       LAYOUT: tp.pp.sp.ep.etp

DIRECTORY/NAME/hf holds a checkpoint; DIRECTORY/NAME gets LAYOUT.pt with the logits of the response
positions of `tiny.samples()` and, by HF name, the weights that the policy exports.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_zero.batching import build_microbatch
from megatron_zero.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.safetensors_io import SafetensorsSource
from megatron_zero.hf_config import read_hf_config
from megatron_zero.losses import next_token_objective
from megatron_zero.policy.parallel import initialize
from tests import tiny


def main() -> None:
    directory = Path(sys.argv[1])
    for case in sys.argv[2:]:
        name, text = case.split(":")
        tp, pp, sp, ep, etp = map(int, text.split("."))
        layout = ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=bool(sp),
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
        )
        topology = initialize(layout, seed=0)
        from megatron_zero.policy import forward
        from megatron_zero.policy.model import padded_vocab_size
        from megatron_zero.policy.policy import Policy

        hf_dir = directory / name / "hf"
        hf_config = read_hf_config(ModelConfig(path=str(hf_dir)))
        policy = Policy(
            mapping_for(hf_config, padded_vocab_size(hf_config["vocab_size"], tp)),
            SafetensorsSource(hf_dir),
            topology,
            parallel=layout,
            optimizer=OptimizerConfig(),
            dtype="fp32",
            objective=next_token_objective,
            num_optimizer_steps=1,
        )
        samples = tiny.samples()
        microbatch = build_microbatch(samples, range(len(samples)), alignment=tp if sp else 1)
        with captured_logits() as captured:
            forward.forward_logprobs(policy.ddp_chunks, [microbatch], topology)
        exported = {n: t.clone() for n, t in policy.hf_weights(bucket_bytes=1 << 16)}
        if topology.is_last_stage and topology.tp_rank == 0 and topology.dp_rank == 0:
            torch.save((captured[0], exported), directory / name / f"{text}.pt")
        dist.barrier()
    dist.destroy_process_group()


class captured_logits:
    """What `PolicyModel` takes its log-probabilities from, whole, while the context is open."""

    def __enter__(self) -> list[torch.Tensor]:
        from megatron_zero.policy.model import PolicyModel

        logits: list[torch.Tensor] = []
        self.model, self.inputs = PolicyModel, PolicyModel._output_layer_inputs

        def capture(model, *args):
            hidden, weight = self.inputs(model, *args)
            local = hidden @ weight.t()
            parts = [torch.empty_like(local) for _ in range(model.pg_collection.tp.size())]
            dist.all_gather(parts, local.contiguous(), group=model.pg_collection.tp)
            logits.append(torch.cat(parts, -1)[:, : model.real_vocab_size])
            return hidden, weight

        PolicyModel._output_layer_inputs = capture
        return logits

    def __exit__(self, *exc: object) -> None:
        self.model._output_layer_inputs = self.inputs


if __name__ == "__main__":
    main()
