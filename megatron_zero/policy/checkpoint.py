"""Sharded training checkpoints: saved from one layout, loaded into any other.

Megatron's distributed checkpoint holds the model, the optimizer's float32 state and, in its common
part, the schedule and whatever the training loop adds. A checkpoint is written under a name that
nobody looks for and renamed when every rank is done, so a directory with a step's name is whole.
"""

import shutil
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist

from megatron_zero.checks import UserError
from megatron_zero.convert.dist_checkpoint import CheckpointReader
from megatron_zero.policy import hf_weights
from megatron_zero.policy.policy import Policy
from megatron_zero.step_names import step_name, steps_in

_INCOMPLETE = ".incomplete"


# Written into each checkpoint: how Megatron's sharded state is named and cut.
_CONTENT = {
    # The default sharding of the distributed optimizer cannot be loaded into another layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    # Each layer under its own key: models of unlike layers have no other way.
    "non_homogeneous_layers": True,
}


def _sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    metadata = _CONTENT | {"dp_cp_group": policy.topology.dp_cp_group}
    chunks = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(policy.chunks)
    }
    optimizer = policy.optimizer.sharded_state_dict(
        chunks, is_loading=is_loading, metadata=metadata
    )
    return {**chunks, "optimizer": optimizer}


def save(directory: Path, policy: Policy, loop_state: dict[str, Any]) -> None:
    """Write `directory` with the policy and the loop's own state; collective.

    Args:
        directory: must not exist; its parent is made.
        policy: model, optimizer and schedule.
        loop_state: plain values, the same on every rank.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    partial = directory.with_name(directory.name + _INCOMPLETE)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=policy.topology.host_group)
    state = _sharded_state(policy, is_loading=False)
    state["loop"] = loop_state
    state["scheduler"] = policy.scheduler.state_dict()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
    dist_checkpointing.save(state, str(partial), strategy, content_metadata=dict(_CONTENT))
    dist.barrier(group=policy.topology.host_group)
    if dist.get_rank() == 0:
        partial.rename(directory)
    dist.barrier(group=policy.topology.host_group)


def load(directory: Path, policy: Policy) -> dict[str, Any]:
    """Restore the policy in place, whatever layout it was saved from; collective.

    Returns:
        The `loop_state` that was saved.

    Raises:
        UserError: `directory` is no complete checkpoint, or a file of it is damaged.
    """
    if not (directory / "metadata.json").is_file():
        raise UserError(f"checkpoint {directory}: no complete checkpoint is there")
    try:
        CheckpointReader(directory)  # compares the sizes of its files
    except ValueError as error:
        raise UserError(f"checkpoint {directory}: {error}") from error
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(directory))
    for i, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(state[f"model{i}"])
    hf_weights.check_loaded(policy.chunks, directory, policy.mapping, policy.topology)
    policy.optimizer.load_state_dict(state["optimizer"])
    # For bf16 the working copy follows from the float32 weights; float32 models train those.
    policy.scheduler.load_state_dict(state["scheduler"])
    loop_state: dict[str, Any] = state["loop"]
    return loop_state


def load_latest(checkpoints: Path, policy: Policy) -> Optional[dict[str, Any]]:
    """Restore the newest complete checkpoint of a folder; None where there is none."""
    steps = saved_steps(checkpoints)
    return load(checkpoints / step_name(steps[-1]), policy) if steps else None


def save_and_prune(
    directory: Path, policy: Policy, loop_state: dict[str, Any], *, keep: int
) -> None:
    """`save` unless it is there already, then remove all but the newest `keep`; collective."""
    if not directory.exists():
        save(directory, policy, loop_state)
    if policy.topology.rank == 0:
        prune(directory.parent, keep=keep)


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    return [step for step in steps_in(checkpoints) if (checkpoints / step_name(step)).is_dir()]


def prune(checkpoints: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (0: none) and what a crash left half done.

    Nothing else that lies there is touched, nor a checkpoint that is a link to another place.
    """
    old = [step_name(step) + _INCOMPLETE for step in steps_in(checkpoints, _INCOMPLETE)]
    steps = saved_steps(checkpoints)
    if keep:
        old += [step_name(step) for step in steps[: len(steps) - keep]]
    for name in old:
        directory = checkpoints / name
        if directory.is_dir() and not directory.is_symlink():
            shutil.rmtree(directory)
