"""Llama 3.x: grouped queries without biases, rotary positions rescaled by frequency band."""

from megatron_zero.convert.families.blocks import decoder, grouped_query_attention, swiglu

LLAMA = decoder(
    "llama",
    "LlamaForCausalLM",
    (*grouped_query_attention(), *swiglu()),
    rope_types=("default", "llama3"),
)
