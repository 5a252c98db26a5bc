"""Llama 3.x: grouped queries without biases, rotary positions rescaled by frequency band."""

from megatron_zero.convert.families.blocks import (
    DEFAULTS,
    ROTARY,
    TIED,
    UNTIED,
    checks,
    dense,
    grouped_query_attention,
)
from megatron_zero.convert.rules import Family

LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    rules=dense(grouped_query_attention()),
    tied_rules=TIED,
    untied_rules=UNTIED,
    checks=checks(),
    defaults=DEFAULTS,
    rope_types=("default", "llama3"),
    ignored=ROTARY,
)
