"""Generating responses: the engine protocol, vLLM behind it, and the sampler that feeds it."""
