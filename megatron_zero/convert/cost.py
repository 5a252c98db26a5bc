"""What a mapped model costs to run, from its sizes alone."""

import math

from megatron_zero.convert.mapping import EXPERT, Mapping


def attention_break_even(mapping: Mapping) -> float:
    """Tokens of a sequence at which attention takes as many operations as all weights do.

    A token takes 2 operations for each weight that it meets. Causal attention over n tokens takes
    2 x n / 2 for each number of a head's key and of its value.
    """
    config, dims = mapping.config, mapping.dims
    num_weights = 0.0
    for name in mapping.megatron_names():
        if name != "embedding.word_embeddings.weight" or mapping.tied:
            is_expert = EXPERT.search(name) is not None
            share = config["num_experts_per_tok"] / dims["num_experts"] if is_expert else 1.0
            num_weights += share * math.prod(mapping.full_shape(name))
    head = dims.get("head_dim") or sum(dims[f"qk_{part}_head_dim"] for part in ("nope", "rope"))
    per_layer = dims["num_attention_heads"] * (head + dims.get("v_head_dim", head))
    return 2 * num_weights / (dims["num_hidden_layers"] * per_layer)
