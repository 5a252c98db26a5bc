"""HF checkpoints <-> Megatron parameters: tables of data over tested tensor functions.

Reading order: `tensors` (what a packed tensor looks like), `rules` (the vocabulary of a table),
`mapping` (a table applied to one model), `families` (the tables). Whole checkpoints: `to_megatron`
and `to_hf` over `dist_checkpoint`, `safetensors_io` and `streaming`; `verify` and `roundtrip` check
them.
Nothing here knows about process groups: ranks and sizes are plain integers.

`hf_to_megatron`, `megatron_to_hf` and `first_difference` are what `tools/convert` calls.
"""

import importlib
from typing import Any

_ENTRY_POINTS = {
    "hf_to_megatron": "to_megatron",
    "megatron_to_hf": "to_hf",
    "first_difference": "roundtrip",
}


def __getattr__(name: str) -> Any:  # torch is loaded when one of them is asked for
    if name not in _ENTRY_POINTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ENTRY_POINTS[name]}"), name)
