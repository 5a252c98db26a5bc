"""Qwen2 and Qwen2.5, Math and Coder included: q, k, v biases, grouped queries, SwiGLU, RMSNorm."""

from megatron_zero.convert.families.blocks import decoder, grouped_query_attention, swiglu

QWEN2 = decoder(
    "qwen2",
    "Qwen2ForCausalLM",
    (*grouped_query_attention(qkv_bias=True), *swiglu()),
    attention_bias=True,
    rope_types=("default", "yarn"),
)
