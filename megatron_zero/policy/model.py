"""The model of one pipeline stage, in chunks, with Transformer Engine's layers or the local ones.

The model returns per-token log-probabilities and entropy, not logits: its output layer works on
the positions of `loss_mask` alone, so neither prompts nor padding cost a row of the vocabulary.
"""

import functools
import importlib.util
import re
from typing import Any, Optional

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_zero.checks import UserError, round_up
from megatron_zero.convert.mapping import EXPERT, Mapping
from megatron_zero.policy.attention import PackedAttention, RMSNorm
from megatron_zero.policy.logprobs import linear_logprobs
from megatron_zero.policy.parallel import Topology
from megatron_zero.policy.rotary import stretched_frequencies
from megatron_zero.policy.upstream import sum_rotary_key_gradient, use_hf_group_scores

GROUPED = re.compile(r"experts\.(linear_fc[12])\.weight(\d+)$")


@functools.cache
def layer_implementation() -> str:
    """`transformer_engine` where it is installed and CUDA is available, else `local`."""
    if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine"):
        return "transformer_engine"
    return "local"


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary, rounded up so that every TP rank holds the same number of rows."""
    return round_up(vocab_size, tp_size)


def _local_layer(config: TransformerConfig, *, is_moe: bool) -> ModuleSpec:
    """Megatron's own layer with our norm and packed attention, checkpointed by TE's names."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if is_moe else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    names: dict[str, str] = {}
    if config.multi_latent_attention:
        for x in ("q", "kv"):
            setattr(attention, f"{x}_layernorm", RMSNorm)
            name = f"self_attention.linear_{x}_up_proj.layer_norm_"
            names[f"self_attention.{x}_layernorm."] = name
    else:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if not is_moe:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.submodules.sharded_state_dict_keys_map = names
    return layer


def layer_spec(config: TransformerConfig, vp_stage: Optional[int]) -> TransformerBlockSubmodules:
    """The layers of one chunk of this stage, by `layer_implementation`."""
    if layer_implementation() == "transformer_engine":
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    has_experts = config.num_moe_experts is not None
    pattern = config.moe_layer_freq if has_experts else [0] * config.num_layers
    specs = [_local_layer(config, is_moe=bool(pattern[layer])) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


class PolicyModel(GPTModel):
    """A GPT whose last stage ends in log-probabilities of the labels.

    `forward(input_ids, position_ids, attention_mask, labels=, loss_mask=, packed_seq_params=)`
    returns [2, R] on the last stage (logprobs, entropy of the R positions where `loss_mask` is
    set) and hidden states on the others.
    """

    def __init__(self, *args: Any, real_vocab_size: int, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.temperature = temperature

    def _postprocess(  # upstream symbol: GPTModel._postprocess, the same in 0.16.1 and 0.19.2
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        labels: Optional[torch.Tensor] = None,
        loss_mask: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        assert labels is not None and loss_mask is not None
        rows = loss_mask.flatten().nonzero().squeeze(1)
        hidden, weight = self._output_layer_inputs(hidden_states, rows)
        logprobs, entropy = linear_logprobs(
            hidden,
            weight,
            labels.flatten()[rows],
            tp_group=self.pg_collection.tp,
            vocab_size=self.real_vocab_size,
            temperature=self.temperature,
        )
        return torch.stack([logprobs, entropy])

    def _output_layer_inputs(
        self, hidden_states: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T or T / tp, 1, H] -> the chosen rows [R, H] and this rank's weight [V / tp, H]."""
        if self.config.sequence_parallel:
            # `linear_logprobs` sums its input's gradient over TP, so the gather must not.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        return hidden_states.squeeze(1).index_select(0, rows), weight


def build_chunks(
    config: TransformerConfig, mapping: Mapping, topology: Topology, *, temperature: float = 1.0
) -> list[PolicyModel]:
    """This rank's chunks of the model, one unless pipelines interleave, with unset weights.

    `temperature` divides the logits, as it does when the engine samples.
    """
    if config.num_moe_experts is not None:
        use_hf_group_scores(mapping.family.model_type)
    if config.multi_latent_attention and layer_implementation() == "local":
        if config.q_lora_rank == config.kv_lora_rank + config.qk_pos_emb_head_dim:
            valid = "must not be kv_lora_rank + qk_rope_head_dim with Megatron's own layers"
            raise UserError(f"HF config q_lora_rank={config.q_lora_rank}: {valid}")
        sum_rotary_key_gradient(config.kv_lora_rank, config.qk_pos_emb_head_dim)
    numbers = range(topology.vp_size) if topology.vp_size > 1 else [None]
    return [_build_chunk(config, mapping, topology, number, temperature) for number in numbers]


def _build_chunk(
    config: TransformerConfig,
    mapping: Mapping,
    topology: Topology,
    vp_stage: Optional[int],
    temperature: float,
) -> PolicyModel:
    rope, vocab_size = mapping.rope, mapping.dims["vocab_size"]
    model = PolicyModel(
        config,
        layer_spec(config, vp_stage),
        vocab_size=padded_vocab_size(vocab_size, topology.tp_size),
        max_sequence_length=mapping.config["max_position_embeddings"],
        pre_process=topology.is_first_stage and vp_stage in (None, 0),
        post_process=topology.is_last_stage and vp_stage in (None, topology.vp_size - 1),
        position_embedding_type="rope",
        rotary_base=rope.theta,
        share_embeddings_and_output_weights=mapping.tied,
        vp_stage=vp_stage,
        real_vocab_size=vocab_size,
        temperature=temperature,
    )
    if not config.multi_latent_attention:  # which stretches positions by itself
        frequencies = stretched_frequencies(rope, config.kv_channels)
        if frequencies is not None:
            model.rotary_pos_emb.inv_freq = frequencies
    return model.to(topology.device)


def global_parameter_names(name: str, model: PolicyModel, topology: Topology) -> tuple[str, ...]:
    """What a parameter of this rank is called in the whole model, on each expert-parallel rank.

    Layers are numbered over all pipeline stages, experts over all expert-parallel ranks; all
    other parameters have one name. TE's grouped layer keeps expert i in `linear_fc1.weight{i}`.
    """
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return (name,)
    local, rest = name[len(prefix) :].split(".", 1)
    rest = GROUPED.sub(r"experts.local_experts.\2.\1.weight", rest)
    layer = f"{prefix}{model.decoder.layers[int(local)].layer_number - 1}."
    match = EXPERT.search(rest)
    if match is None:
        return (layer + rest,)
    num_local = model.config.num_moe_experts // topology.ep_size
    return tuple(
        layer + EXPERT.sub(f"experts.local_experts.{int(match[1]) + rank * num_local}.", rest)
        for rank in range(topology.ep_size)
    )
