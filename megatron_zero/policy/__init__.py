"""The trained model on Megatron-Core: the only importer of megatron.core and transformer_engine."""
