"""megatron_zero: R1-Zero-like training with Dr. GRPO on Megatron-Core and vLLM."""

__version__ = "0.1.0"
