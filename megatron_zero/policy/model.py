"""HF config -> TransformerConfig -> model, with Transformer Engine's layers or the local ones.

The model returns per-token log-probabilities and entropy, not logits: its output layer works on
the positions of `loss_mask` alone, so neither prompts nor padding cost a row of the vocabulary.
"""

import functools
import importlib.util
from typing import Any, Optional

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_zero.config import ParallelConfig
from megatron_zero.convert.hf_config import rope_settings
from megatron_zero.policy.attention import PackedAttention, RMSNorm
from megatron_zero.policy.logprobs import vocab_parallel_logprobs
from megatron_zero.policy.parallel import Topology

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@functools.cache
def layer_implementation() -> str:
    """`transformer_engine` where it is installed and CUDA is available, else `local`."""
    if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine"):
        return "transformer_engine"
    return "local"


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary, rounded up so that every TP rank holds the same number of rows."""
    return -(-vocab_size // tp_size) * tp_size


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(
    hf_config: dict[str, Any], parallel: ParallelConfig, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's configuration of an HF model (Qwen2's block) in this layout."""
    heads = hf_config["num_attention_heads"]
    recompute: dict[str, Any] = {}
    if parallel.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif parallel.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    on_gpu = torch.cuda.is_available()
    with_te = layer_implementation() == "transformer_engine"
    return TransformerConfig(
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        ffn_hidden_size=hf_config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf_config.get("num_key_value_heads") or heads,
        kv_channels=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        layernorm_epsilon=hf_config["rms_norm_eps"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are loaded, never drawn. Not `perform_initialization=False`: that also leaves
        # out the marks by which the gradient norm tells sharded parameters from replicated ones.
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        use_cpu_initialization=not on_gpu,
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, dense models too
        calculate_per_token_loss=True,  # the sum contract, see policy/forward.py
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=with_te,
        persist_layer_norm=with_te,
        **recompute,
    )


def _local_block(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's own layers with our norm and packed attention."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    num_layers = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def layer_spec(config: TransformerConfig) -> "ModuleSpec | TransformerBlockSubmodules":
    """The layers of this stage, by `layer_implementation`."""
    if layer_implementation() == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec()
    return _local_block(config)


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
        logits = self._logits(hidden_states, rows)
        logprobs, entropy = vocab_parallel_logprobs(
            logits,
            labels.flatten()[rows],
            tp_group=self.pg_collection.tp,
            vocab_size=self.real_vocab_size,
            temperature=self.temperature,
        )
        return torch.stack([logprobs, entropy])

    def _logits(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[T or T / tp, 1, hidden] -> this rank's slice of the vocabulary, [R, V / tp]."""
        if self.config.sequence_parallel:
            # The linear layer below sums its input's gradient over TP, so the gather must not.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        return linear_with_grad_accumulation_and_async_allreduce(
            input=hidden_states.squeeze(1).index_select(0, rows),
            weight=weight,
            bias=None,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
            allreduce_dgrad=self.pg_collection.tp.size() > 1,
            sequence_parallel=False,
            tp_group=self.pg_collection.tp,
        )


def build_model(
    config: TransformerConfig,
    hf_config: dict[str, Any],
    topology: Topology,
    *,
    temperature: float = 1.0,
) -> PolicyModel:
    """This rank's stage, on its device, with unset weights.

    `temperature` divides the logits, as it does when the engine samples.
    """
    model = PolicyModel(
        config,
        layer_spec(config),
        vocab_size=padded_vocab_size(hf_config["vocab_size"], topology.tp_size),
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        position_embedding_type="rope",
        rotary_base=rope_settings(hf_config, default_theta=10000.0).theta,
        share_embeddings_and_output_weights=bool(hf_config["tie_word_embeddings"]),
        real_vocab_size=hf_config["vocab_size"],
        temperature=temperature,
    )
    return model.to(topology.device)


def global_parameter_name(name: str, model: PolicyModel) -> str:
    """A parameter's name in the whole model: layers are numbered over all pipeline stages."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    local, rest = name[len(prefix) :].split(".", 1)
    return f"{prefix}{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
