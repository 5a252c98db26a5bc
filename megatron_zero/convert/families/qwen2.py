"""Qwen2 and Qwen2.5, Math and Coder included: q, k, v biases, grouped queries, SwiGLU, RMSNorm.

Data only. Megatron names are those of the local layer spec; aliases are Transformer Engine's.
"""

from megatron_zero.convert.hf_config import ConfigCheck
from megatron_zero.convert.rules import Family, HfTensor, Rule

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."


def _qkv(part: str, rest: tuple[str, ...], init: str) -> tuple[HfTensor, ...]:
    sizes = (("q", "q_rows"), ("k", "kv_rows"), ("v", "kv_rows"))
    return tuple(
        HfTensor(f"{_HF}self_attn.{x}_proj.{part}", (rows, *rest), init) for x, rows in sizes
    )


LAYER_RULES = (
    Rule(
        megatron=_MEGATRON + "input_layernorm.weight",
        hf=(HfTensor(_HF + "input_layernorm.weight", ("hidden_size",), "ones"),),
        alias=_MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Rule(
        megatron=_MEGATRON + "self_attention.linear_qkv.weight",
        hf=_qkv("weight", ("hidden_size",), "normal"),
        kind="qkv",
        tp_dim=0,
    ),
    Rule(
        megatron=_MEGATRON + "self_attention.linear_qkv.bias",
        hf=_qkv("bias", (), "zeros"),
        kind="qkv",
        tp_dim=0,
    ),
    Rule(
        megatron=_MEGATRON + "self_attention.linear_proj.weight",
        hf=(HfTensor(_HF + "self_attn.o_proj.weight", ("hidden_size", "q_rows")),),
        tp_dim=1,
    ),
    Rule(
        megatron=_MEGATRON + "pre_mlp_layernorm.weight",
        hf=(HfTensor(_HF + "post_attention_layernorm.weight", ("hidden_size",), "ones"),),
        alias=_MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    ),
    Rule(
        megatron=_MEGATRON + "mlp.linear_fc1.weight",
        hf=(
            HfTensor(_HF + "mlp.gate_proj.weight", ("intermediate_size", "hidden_size")),
            HfTensor(_HF + "mlp.up_proj.weight", ("intermediate_size", "hidden_size")),
        ),
        kind="gate_up",
        tp_dim=0,
    ),
    Rule(
        megatron=_MEGATRON + "mlp.linear_fc2.weight",
        hf=(HfTensor(_HF + "mlp.down_proj.weight", ("hidden_size", "intermediate_size")),),
        tp_dim=1,
    ),
)

EMBEDDING = HfTensor("model.embed_tokens.weight", ("vocab_size", "hidden_size"))

QWEN2 = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    rules=(
        Rule(megatron="embedding.word_embeddings.weight", hf=(EMBEDDING,), kind="vocab", tp_dim=0),
        *LAYER_RULES,
        Rule(
            megatron="decoder.final_layernorm.weight",
            hf=(HfTensor("model.norm.weight", ("hidden_size",), "ones"),),
        ),
    ),
    # Tied: with several pipeline stages the last one holds a copy of the embedding.
    tied_rules=(
        Rule(
            megatron="output_layer.weight", hf=(EMBEDDING,), kind="vocab", tp_dim=0, exported=False
        ),
    ),
    untied_rules=(
        Rule(
            megatron="output_layer.weight",
            hf=(HfTensor("lm_head.weight", ("vocab_size", "hidden_size")),),
            kind="vocab",
            tp_dim=0,
        ),
    ),
    checks=(
        ConfigCheck("hidden_act", ("silu",), "the MLP is SwiGLU"),
        ConfigCheck("use_sliding_window", (False,), "attention is over the whole prefix"),
        ConfigCheck("layer_types", ("full_attention",), "attention is over the whole prefix"),
        ConfigCheck("use_mrope", (False,), "positions have one dimension"),
        ConfigCheck("attention_bias", (True,), "q, k and v have biases, the output has none"),
        ConfigCheck("mlp_bias", (False,), "the MLP has no biases"),
        ConfigCheck("attention_dropout", (0, None), "the policy runs without dropout"),
        ConfigCheck("tie_word_embeddings", (True, False), "embeddings are tied or not"),
        ConfigCheck("quantization_config", (None,), "weights must not be quantized"),
    ),
    defaults={
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    ignored=(
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"model\.rotary_emb\.inv_freq",
        r"lm_head\.weight",  # tied: some checkpoints store it again; untied: a rule maps it
    ),
)
