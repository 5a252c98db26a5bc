"""The vocabulary of a family's table: tensors, rules, and the config for which they hold.

A `Rule` says which HF tensors make which Megatron parameter, how (`tensors`) and how the parameter
is split over tensor-parallel ranks. A `Family` is the rules of one HF `model_type`.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Optional

from megatron_zero.convert import hf_config as configs
from megatron_zero.convert.fp8 import is_fp8_blocks
from megatron_zero.convert.hf_config import Checks, Dims, HfConfig
from megatron_zero.convert.tensors import KINDS

INITS = ("normal", "zeros", "ones")
INDEX = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A tensor of the HF checkpoint: name pattern, shape in sizes of `Dims`, and how it starts.

    Example: HfTensor("model.layers.{layer}.self_attn.q_proj.bias", ("q_rows",), init="zeros")
    """

    name: str
    shape: tuple[str, ...]
    init: str = "normal"  # normal: standard deviation `initializer_range`; zeros; ones

    def __post_init__(self) -> None:
        assert self.init in INITS, f"{self.name}: init={self.init!r} is not one of {INITS}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How HF tensors make one Megatron parameter, for every layer (and expert) at once.

    `megatron` and `hf` hold the same placeholders, such as `{layer}`; the family says how far each
    counts. `{mtp}` counts multi-token-prediction layers, which HF numbers after the others:
    `{mtp_layer}` there. `alias` is the same parameter's name under Transformer Engine, whose fused
    layers put a norm's weight inside the linear layer behind it.
    """

    megatron: str
    hf: tuple[HfTensor, ...]
    kind: str = "copy"  # a key of `tensors.KINDS`
    tp_dim: Optional[int] = None  # None: every tensor-parallel rank holds all of it
    alias: Optional[str] = None
    layers: str = "all"  # a key of the family's `layer_sets`
    float32: bool = False  # stays float32 whatever the dtype of the weights
    exported: bool = True  # False: a copy that the HF checkpoint holds under another rule

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"{self.megatron}: unknown kind {self.kind!r}"
        assert len(self.hf) == KINDS[self.kind].num_hf, f"{self.megatron}: wrong number of tensors"
        names = (self.alias or self.megatron, *(tensor.name for tensor in self.hf))
        wanted = set(INDEX.findall(self.megatron))
        found = {name: set(INDEX.findall(name.replace("{mtp_layer}", "{mtp}"))) for name in names}
        differing = [name for name in names if found[name] != wanted]
        assert not differing, f"{self.megatron}: other placeholders in {differing}"


def layer_sets(dims: Dims, moe: Collection[int] = ()) -> dict[str, Sequence[int]]:
    """Layers by what is in them: those of `moe` have experts."""
    layers = range(dims["num_hidden_layers"])
    sets = {"moe": [i for i in layers if i in moe], "dense": [i for i in layers if i not in moe]}
    return {"all": layers, **sets}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Everything the engine knows of one HF `model_type`.

    `defaults` are the values the HF config class fills in for fields that are not written.
    `layer_sets` names the layers that a rule may be limited to: "all", "moe" (with experts) and
    "dense", and what else a family needs. `copies` are HF tensors that repeat another one, by its
    name. `ignored` are regular expressions of HF tensors that may be stored and are never read,
    unless a rule maps them.
    `fp8_blocks`: weights may be stored in 8 bits with a scale per block.
    """

    model_type: str
    rules: tuple[Rule, ...]
    tied_rules: tuple[Rule, ...]  # added when tie_word_embeddings is true
    untied_rules: tuple[Rule, ...]  # added when it is false
    checks: Checks
    defaults: dict[str, object]
    rope_theta: float = 10000.0  # where the config has none
    rope_types: tuple[str, ...] = ("default",)
    counts: dict[str, str] = field(default_factory=dict)  # placeholder -> a key of `Dims`
    dims: Callable[[HfConfig], Dims] = configs.decoder_dims
    layer_sets: Callable[[HfConfig, Dims], dict[str, Sequence[int]]] = lambda c, d: layer_sets(d)
    copies: Callable[[Dims], dict[str, str]] = lambda dims: {}
    fp8_blocks: bool = False
    ignored: tuple[str, ...] = ()

    def check_config(self, hf_config: HfConfig) -> None:
        """Refuse a config whose mathematics the rules do not describe.

        Raises:
            ValueError: naming the field.
        """
        configs.check_fields({**self.defaults, **hf_config}, self.checks)
        quantization = hf_config.get("quantization_config")
        if quantization is not None and not (self.fp8_blocks and is_fp8_blocks(quantization)):
            valid = "must be null" + ", or fp8 with weight_block_size" * self.fp8_blocks
            configs.refuse(f"quantization_config={quantization!r}", valid)
        rope = configs.rope_settings(hf_config, self.rope_theta)
        if rope.rope_type not in self.rope_types:
            valid = f"must be one of {list(self.rope_types)}: other positions are not covered"
            configs.refuse(f"rope_type={rope.rope_type!r}", valid)
        if rope.partial_rotary_factor != 1.0:
            configs.refuse(f"partial_rotary_factor={rope.partial_rotary_factor}", "must be 1.0")
