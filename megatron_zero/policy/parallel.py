"""torch.distributed and Megatron's process groups -> `Topology`.

The only reader of `megatron.core.parallel_state`: everything else is handed the groups it needs.
"""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_zero.config import ParallelConfig
from megatron_zero.policy import cpu


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """This rank's coordinates and groups.

    `dp` counts replicas that see different samples; `cp` ranks share a sample's tokens, so sums
    over all tokens go over `dp_cp`. Experts have their own: `ep` and, within an expert, `etp`.
    """

    rank: int
    world_size: int
    device: torch.device
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    vp_size: int
    cp_size: int
    cp_rank: int
    dp_size: int
    dp_rank: int
    ep_size: int
    ep_rank: int
    etp_size: int
    etp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup  # ranks with the same experts
    etp_group: dist.ProcessGroup
    host_group: dist.ProcessGroup  # all ranks, for Python objects: gloo on every machine

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)


def _leave_groups() -> None:
    """Undo Megatron's cut of the job. It only forgets its groups, whose threads would go on."""
    from megatron.core import parallel_state

    groups = set(parallel_state._global_process_group_list or ()) - {None}
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def initialize(parallel: ParallelConfig, *, seed: int) -> Topology:
    """Join the job and cut it into Megatron's groups; may be called again with another layout.

    NCCL where CUDA is available, gloo otherwise. Reads torchrun's environment.
    """
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # An hour: a rank may wait that long for another one's rollouts or checkpoint.
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=60)
        )
    if parallel_state.model_parallel_is_initialized():
        _leave_groups()
    vp_size = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vp_size if vp_size > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        vp_size=vp_size,
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        edp_group=parallel_state.get_expert_data_parallel_group(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        host_group=dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD,
    )
