"""Qwen2 and Qwen2.5, Math and Coder included: q, k, v biases, grouped queries, SwiGLU, RMSNorm."""

from megatron_zero.convert.families import blocks
from megatron_zero.convert.rules import Family

QWEN2 = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    rules=blocks.dense(blocks.grouped_query_attention(qkv_bias=True)),
    tied_rules=blocks.TIED,
    untied_rules=blocks.UNTIED,
    checks=blocks.checks(attention_bias=True),
    defaults=blocks.DEFAULTS,
    ignored=blocks.ROTARY,
)
