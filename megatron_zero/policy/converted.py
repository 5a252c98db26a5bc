"""Weights from a Megatron distributed checkpoint, as the conversion tools write it."""

from collections.abc import Sequence
from pathlib import Path

from megatron_zero.policy.model import PolicyModel
from megatron_zero.policy.parallel import Topology


def load(directory: Path, chunks: Sequence[PolicyModel], topology: Topology) -> None:
    """Fill this rank's stage from a checkpoint without optimizer state; collective.

    Args:
        directory: written by `tools/convert/hf_to_megatron.py`, from any layout into any.
    """
    from megatron.core import dist_checkpointing

    metadata = {"non_homogeneous_layers": True, "dp_cp_group": topology.dp_cp_group}
    state = {}
    for i, chunk in enumerate(chunks):
        # Transformer Engine's state of 8-bit recipes is not part of a converted model.
        state[f"model{i}"] = {
            name: value
            for name, value in chunk.sharded_state_dict(metadata=metadata).items()
            if not name.endswith("_extra_state")
        }
    loaded = dist_checkpointing.load(state, str(directory))
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        left = [n for n in (*missing, *unexpected) if not n.endswith("_extra_state")]
        assert not left, f"{directory} did not fill {left}"
