"""Weights from a Megatron distributed checkpoint, as the conversion tools write it."""

from pathlib import Path

from megatron_zero.policy.model import PolicyModel
from megatron_zero.policy.parallel import Topology


def is_megatron_checkpoint(directory: Path) -> bool:
    """Whether a folder holds a distributed checkpoint, such as the conversion tools write."""
    return (directory / "metadata.json").is_file() and (directory / ".metadata").is_file()


def load(directory: Path, model: PolicyModel, topology: Topology) -> None:
    """Fill this rank's stage from a checkpoint without optimizer state; collective.

    Args:
        directory: written by `tools/convert/hf_to_megatron.py`, from any layout into any.
    """
    from megatron.core import dist_checkpointing

    state = model.sharded_state_dict(
        metadata={"non_homogeneous_layers": True, "dp_cp_group": topology.dp_group}
    )
    # Transformer Engine's state of 8-bit recipes: not part of a converted model.
    extra = [name for name in state if name.endswith("_extra_state")]
    for name in extra:
        del state[name]
    loaded = dist_checkpointing.load({"model": state}, str(directory))["model"]
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    left = sorted({*missing, *unexpected} - set(extra))
    assert not left, f"{directory} did not fill {left}"
