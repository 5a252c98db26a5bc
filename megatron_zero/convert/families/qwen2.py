"""Qwen2 and Qwen2.5, Math and Coder included: q, k, v biases, grouped queries, SwiGLU, RMSNorm."""

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

QWEN2 = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    rules=dense(grouped_query_attention(qkv_bias=True)),
    tied_rules=TIED,
    untied_rules=UNTIED,
    checks=checks(attention_bias=True),
    defaults=DEFAULTS,
    ignored=ROTARY,
)
