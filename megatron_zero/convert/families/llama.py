"""Llama 3.x: grouped queries without biases, rotary positions rescaled by frequency band."""

from megatron_zero.convert.families import blocks
from megatron_zero.convert.rules import Family

LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    rules=blocks.dense(blocks.grouped_query_attention()),
    tied_rules=blocks.TIED,
    untied_rules=blocks.UNTIED,
    checks=blocks.checks(),
    defaults=blocks.DEFAULTS,
    rope_types=("default", "llama3"),
    ignored=blocks.ROTARY,
)
