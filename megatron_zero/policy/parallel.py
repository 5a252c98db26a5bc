"""torch.distributed and Megatron's process groups -> `Topology`.

The only reader of `megatron.core.parallel_state`: everything else is handed the groups it needs.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

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


# Ours -> Megatron's names of sizes, ranks and groups, less "_parallel".
_GROUPS = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "ep": "expert_model"}
_GROUPS["etp"] = "expert_tensor"


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
        # A rank may wait that long for another one's rollouts or checkpoint.
        an_hour = datetime.timedelta(hours=1)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=an_hour)
    if parallel_state.model_parallel_is_initialized():
        _leave_groups()
    vp_size = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        virtual_pipeline_model_parallel_size=vp_size if vp_size > 1 else None,
        **parallel.megatron_sizes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    places: dict[str, Any] = {}
    for short, name in {**_GROUPS, "dp": "data"}.items():
        places[f"{short}_size"] = getattr(parallel_state, f"get_{name}_parallel_world_size")()
        places[f"{short}_rank"] = getattr(parallel_state, f"get_{name}_parallel_rank")()
    for short, name in {**_GROUPS, "edp": "expert_data"}.items():
        places[f"{short}_group"] = getattr(parallel_state, f"get_{name}_parallel_group")()
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        vp_size=vp_size,
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        host_group=dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD,
        **places,
    )
