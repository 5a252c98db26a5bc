"""Choosing the layers of the next policy, where the library chooses by what is installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_zero.policy import cpu


@contextmanager
def use_layers(name: str) -> Iterator[None]:
    """`transformer_engine` or `local`; policies built inside keep what they were built with."""
    cpu.install()
    from megatron_zero.policy import model, policy

    chosen = model.layer_implementation
    try:
        model.layer_implementation = policy.layer_implementation = lambda: name
        yield
    finally:
        model.layer_implementation = policy.layer_implementation = chosen
