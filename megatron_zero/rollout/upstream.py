"""What vLLM does otherwise than the policy: symbols replaced on a CPU, fields of a config set.

Checked with vLLM 0.32.0. Each function names the upstream symbol and what is wrong with it.
"""

import functools
import os
from pathlib import Path
from typing import Any, Optional

import torch

from megatron_zero.determinism import derive_seed


def is_latent(hf_config: dict[str, Any]) -> bool:
    """Whether the model has multi-head latent attention (DeepSeek-V2, V3)."""
    return bool(hf_config.get("kv_lora_rank"))


def config_overrides(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `config.json` that vLLM reads otherwise than transformers, as it must read them.

    Upstream symbol: deepseek_v2.DeepseekV2MoE.__init__. Without `topk_method` it builds no router
    bias and without `scoring_func` takes a softmax, but transformers' DeepSeek-V3 writes neither;
    and it limits the choice of experts to groups whenever there are any, `topk_method="greedy"` or
    not, and cannot do without their number.
    """
    model_type = hf_config.get("model_type")
    if model_type == "deepseek_v3":
        return {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    if model_type == "deepseek_v2" and hf_config.get("topk_method", "greedy") == "greedy":
        return {"n_group": 1, "topk_group": 1}
    return {}


def prepare_cpu_engine(tp_size: int) -> None:
    """Replace what is wrong in vLLM on a CPU, in this process, before an engine is made.

    Each symbol once, however many engines there are: replaced twice, experts would be packed twice.
    """
    _skip_memory_binding()
    if tp_size > 1:
        _name_shared_memory_by_job()
    _pack_experts_at_every_load()
    _rotate_by_heads()


@functools.cache
def _pack_experts_at_every_load() -> None:
    """Let new weights of experts be packed as the first ones were.

    Upstream symbol: UnquantizedFusedMoEMethod._setup_kernel. On a CPU the experts' weights are
    padded and packed for its matrix products in `fused_experts.process_weights_after_loading`,
    which is called when the kernel is made, at the first load only: later ones are copied over the
    packed weights as they come, and every expert computes nonsense.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    setup_kernel = UnquantizedFusedMoEMethod._setup_kernel

    def setup_kernel_and_pack(
        self: Any, layer: torch.nn.Module, w13: torch.Tensor, w2: torch.Tensor
    ) -> None:
        is_update = self.moe_kernel is not None
        setup_kernel(self, layer=layer, w13=w13, w2=w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = setup_kernel_and_pack


@functools.cache
def _rotate_by_heads() -> None:
    """Let queries that come as [tokens, heads, head size] be rotated right.

    Upstream symbol: RotaryEmbedding.forward_cpu. The kernel takes the stride of the last dimension
    but one for that of tokens, which it is in [tokens, heads * head size] only. Latent attention
    brings heads apart; with YaRN it has another class, which is right.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    forward_cpu = RotaryEmbedding.forward_cpu

    def forward_flat_or_native(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        if query.dim() > 2:
            return self.forward_native(positions, query, key)
        return forward_cpu(self, positions, query, key)

    RotaryEmbedding.forward_cpu = forward_flat_or_native


@functools.cache
def _skip_memory_binding() -> None:
    """Do not bind memory to the only node that there is: nothing but a warning comes of it.

    It is printed by C++ code, past all filters. Upstream symbol: cpu_worker's init_cpu_memory_env.
    """
    nodes = Path("/sys/devices/system/node/has_memory")
    if nodes.is_file() and nodes.read_text().strip() == "0":
        torch.ops._C.init_cpu_memory_env = lambda nodes: None


@functools.cache
def _name_shared_memory_by_job() -> None:
    """Keep two jobs of one machine, or one that was killed and its successor, apart.

    vLLM's CPU workers exchange tensors through shared memory that is named after the ranks alone
    when torchrun started them: what a killed job left there would refuse every later one.
    Upstream symbol: cpu_communicator._CPUSHMDistributed.make_group_name.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    shared_memory = cpu_communicator._CPUSHMDistributed
    make_name = shared_memory.make_group_name
    job = derive_seed(*(os.environ.get(name) for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")))
    shared_memory.make_group_name = staticmethod(lambda c: f"{job:x}{make_name(c).lstrip('/')}")
