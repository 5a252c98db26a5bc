"""Symbols of Megatron-Core that a model needs replaced; checked with 0.16.1.

Each function names the symbol and what is wrong with it. They change the module for this process,
whose policy and reference policy are the same model.
"""

import functools

import torch

BEST_OF_GROUP = {"deepseek_v2": 1, "deepseek_v3": 2}


def group_limited_topk(
    scores: torch.Tensor,
    topk: int,
    num_tokens: int,
    num_experts: int,
    num_groups: int,
    group_topk: int,
    *,
    num_best: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best experts of the best groups (upstream symbol: moe_utils.group_limited_topk).

    Megatron scores a group by the sum of its `topk // group_topk` best experts, which is V3's rule
    for V3's numbers alone: V3 sums the best two, V2 takes the best one.

    Args:
        scores: [num_tokens, num_experts].
        num_best: how many of a group's experts make its score.

    Returns:
        Scores and indices of the chosen experts, both [num_tokens, topk].
    """
    by_group = scores.view(num_tokens, num_groups, num_experts // num_groups)
    group_scores = by_group.topk(num_best, dim=-1).values.sum(-1)
    chosen = group_scores.topk(group_topk, dim=-1, sorted=False).indices
    is_open = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
    limited = by_group.masked_fill(~is_open.unsqueeze(-1), float("-inf")).flatten(1)
    values, indices = limited.topk(topk, dim=-1)
    return values, indices


def use_hf_group_scores(model_type: str) -> None:
    """Let the routers score groups of experts as the HF model does."""
    from megatron.core.transformer.moe import moe_utils

    if model_type in BEST_OF_GROUP:
        moe_utils.group_limited_topk = functools.partial(
            group_limited_topk, num_best=BEST_OF_GROUP[model_type]
        )


def sum_rotary_key_gradient(kv_lora_rank: int, rope_dim: int) -> None:
    """Let latent attention sum the rotary key's gradient over tensor parallelism.

    With Megatron's own layers every rank gathers the same `k_pos_emb` and uses it for its heads;
    the gather's backward keeps one rank's part of the gradient where the sum is needed (upstream
    symbol: MLASelfAttention.get_query_key_value_tensors). The latent part is right under sequence
    parallelism, which mixture and latent models require here.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer import multi_latent_attention as latent

    def gather(gathered: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        whole = mappings.gather_from_tensor_model_parallel_region(gathered, *args, **kwargs)
        if whole.size(-1) != kv_lora_rank + rope_dim:
            return whole  # the queries'
        compressed, rotary = whole.split([kv_lora_rank, rope_dim], dim=-1)
        rotary = mappings.copy_to_tensor_model_parallel_region(rotary)
        return torch.cat([compressed, rotary], dim=-1)

    latent.gather_from_tensor_model_parallel_region = gather
