"""Under torchrun: what each rank reads of a checkpoint, and what an export holds at once.

reading_worker.py DIRECTORY LAYOUT...        LAYOUT: see tests/layouts.py (tp2-sp, ep4, ...)

DIRECTORY holds the checkpoint, DIRECTORY/damaged the same with one NaN. Rank 0 prints RESULT and,
by layout, every rank's bytes, the largest message of an export, whether it gave the checkpoint's
tensors, and what every rank says of the NaN, read from the file and put into its own memory.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_zero.checks import UserError
from megatron_zero.config import ModelConfig, OptimizerConfig
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.hf_dir import open_source
from megatron_zero.convert.safetensors_io import SafetensorsSource
from megatron_zero.hf_config import read_hf_config
from megatron_zero.losses import next_token_objective
from megatron_zero.policy.parallel import initialize
from tests.layouts import parallel_of


def bytes_read() -> int:
    """All that this process asked the kernel to read from files, so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


class largest_message:
    """Bytes of the largest result of a collective while the context is open."""

    def __enter__(self) -> "largest_message":
        self.bytes = 0
        self.saved = dist.broadcast, dist.all_gather_into_tensor
        dist.broadcast, dist.all_gather_into_tensor = map(self.counted, self.saved)
        return self

    def counted(self, collective):
        def call(tensor, *args, **kwargs):
            self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
            return collective(tensor, *args, **kwargs)

        return call

    def __exit__(self, *exc: object) -> None:
        dist.broadcast, dist.all_gather_into_tensor = self.saved


def measure(text: str, directory: Path, bucket_bytes: int) -> dict:
    from megatron_zero.policy import hf_weights
    from megatron_zero.policy.model import padded_vocab_size
    from megatron_zero.policy.policy import Policy

    layout = parallel_of(text.split("-"))
    topology = initialize(layout, seed=0)
    hf_config = read_hf_config(ModelConfig(path=str(directory)))
    mapping = mapping_for(hf_config, padded_vocab_size(hf_config["vocab_size"], topology.tp_size))
    policy = Policy(
        mapping,
        SafetensorsSource(directory),
        topology,
        parallel=layout,
        optimizer=OptimizerConfig(),
        dtype="fp32",
        objective=next_token_objective,
        num_optimizer_steps=1,
    )
    before = bytes_read()
    hf_weights.load(policy.chunks, mapping, SafetensorsSource(directory), topology)
    own = bytes_read() - before
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    with largest_message() as largest:
        exported = {n: t.clone() for n, t in policy.hf_weights(bucket_bytes=bucket_bytes)}
    expected = load_file(directory / "model.safetensors")
    same = exported.keys() == expected.keys() and all(
        torch.equal(exported[name], expected[name]) for name in expected
    )
    damaged = directory / "damaged"
    said = {
        "file": said_by_all(
            lambda: hf_weights.load(
                policy.chunks, mapping, open_source(damaged, hf_config, "fp32"), topology
            )
        )
    }
    hf_weights.load(policy.chunks, mapping, SafetensorsSource(directory), topology)
    if topology.rank == topology.world_size - 1:
        with torch.no_grad():
            next(policy.chunks[0].parameters()).flatten()[-1] = float("inf")
    said["memory"] = said_by_all(
        lambda: hf_weights.check_loaded(policy.chunks, directory, mapping, topology)
    )
    return {"read": everyone, "largest": largest.bytes, "same": same, "said": said}


def said_by_all(action: Callable[[], None]) -> list[str]:
    """What every rank's refusal says."""
    said, everyone = "", [""] * dist.get_world_size()
    try:
        action()
    except UserError as error:
        said = str(error)
    dist.all_gather_object(everyone, said)
    return everyone


def main() -> None:
    directory, bucket_bytes = Path(sys.argv[1]), int(sys.argv[2])
    found = {text: measure(text, directory, bucket_bytes) for text in sys.argv[3:]}
    if dist.get_rank() == 0:
        print("RESULT", json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
