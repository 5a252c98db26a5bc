"""Reading HF `config.json` dictionaries: sizes, rotary settings, and refusing what is not covered.

A converted model must compute what the original does. A config field can change the mathematics
without changing one tensor (an activation, a rotary scaling), so each family lists the values its
table is valid for, and everything else is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn, Optional

from megatron_zero.checks import UserError

HfConfig = Mapping[str, object]
Dims = dict[str, int]
# field -> values it may have where it is given (of lists: each element), and why
Checks = dict[str, tuple[tuple[object, ...], str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSettings:
    """Rotary embedding: `rope_type` is "default" when positions are not rescaled.

    `scaling` holds the numbers of a rescaling by HF's names, such as `factor`; `truncate`: YaRN's.
    """

    rope_type: str
    theta: float
    partial_rotary_factor: float = 1.0
    scaling: dict[str, float] = field(default_factory=dict)
    truncate: bool = True


_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
_SIZES += ("num_attention_heads",)
_NO_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
ORIGINAL_LENGTH = "original_max_position_embeddings"
# rope_type -> the numbers that it needs, and those that it may have
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_YARN = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
_SCALING = {"default": ((), ()), "llama3": (_LLAMA3, ()), "yarn": (("factor",), _YARN)}
# a null is as if the field were not there, also for the engine
_NULLABLE = ("attention_factor", "mscale", "mscale_all_dim")
# what a rescaling is not defined without; inclusive lower bounds, or exclusive at 0
_LOWEST = {"factor": 1.0, ORIGINAL_LENGTH: 1.0}
_POSITIVE = ("attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")


def check_fields(hf_config: HfConfig, checks: Checks) -> None:
    """Refuse a config with a field outside its allowed values.

    Raises:
        ValueError: naming the field, its value and why it matters.
    """
    for name, (allowed, reason) in checks.items():
        value = hf_config.get(name, ())
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if item not in allowed:
                refuse(f"{name}={value!r}", f"{reason}; must be {' or '.join(map(repr, allowed))}")


def rope_settings(hf_config: HfConfig, default_theta: Optional[float] = None) -> RopeSettings:
    """Rotary settings of both generations of config.

    transformers 5 writes `rope_parameters={"rope_type": ..., "rope_theta": ...}`; before that,
    `rope_theta` stood at the top and a non-null `rope_scaling` held `rope_type` (or `type`). Both
    may be present if they agree.

    Args:
        hf_config: the model's `config.json`.
        default_theta: what the model's HF class uses when no theta is written.

    Raises:
        ValueError: if theta is nowhere, the two generations disagree, the settings are per layer
            type, or a rescaling has a field that it does not know, lacks one or has a wrong value.
    """
    blocks = [_rope_block(hf_config, name) for name in ("rope_parameters", "rope_scaling")]
    types = [_rope_type(block) for block in blocks if block]
    written = [hf_config, *blocks]
    rope_type = str(_agreed("rope_type", types or ["default"]))
    scaling: dict[str, float] = {}
    if rope_type in _SCALING:  # the others no table covers
        scaling = _scaling(hf_config, blocks, rope_type)
    truncate = _agreed("truncate", [b["truncate"] for b in blocks if "truncate" in b] or [True])
    if not isinstance(truncate, bool):
        refuse(f"truncate={truncate!r}", "must be true or false")
    return RopeSettings(
        rope_type=rope_type,
        theta=_number("rope_theta", written, default_theta),
        partial_rotary_factor=_number("partial_rotary_factor", written, 1.0),
        scaling=scaling,
        truncate=truncate,
    )


def _scaling(hf_config: HfConfig, blocks: list[HfConfig], rope_type: str) -> dict[str, float]:
    """The numbers of a rescaling; the original length is the model's where it is not written."""
    needed, optional = _SCALING[rope_type]
    known = {*needed, *optional, *_NO_SCALING, *([ORIGINAL_LENGTH] if needed else [])}
    unknown = sorted(set().union(*blocks) - known)
    if unknown:
        refuse(f"rope_parameters.{unknown[0]}", f"rope_type={rope_type!r} has no such field")
    scaling: dict[str, float] = {}
    for name in (*needed, *optional):
        given = [block[name] for block in blocks if name in block]
        is_absent = all(value is None for value in given) and name in _NULLABLE
        if name in needed or (given and name != "truncate" and not is_absent):
            scaling[name] = _number(name, blocks)
    if needed:
        longest = hf_config.get("max_position_embeddings")
        length = longest if isinstance(longest, int) else None
        scaling[ORIGINAL_LENGTH] = _number(ORIGINAL_LENGTH, [hf_config, *blocks], length)
    for name, value in scaling.items():
        if value < _LOWEST.get(name, value):
            refuse(f"{name}={value}", f"must be at least {_LOWEST[name]}")
        if name in _POSITIVE and value <= 0:
            refuse(f"{name}={value}", "must be above 0")
    return scaling


def decoder_dims(hf_config: HfConfig) -> Dims:
    """Sizes of a decoder with grouped-query attention, by the names the tables use.

    Returns:
        The config's own `hidden_size`, `intermediate_size`, `vocab_size`, `num_hidden_layers`,
        `num_attention_heads`, `num_key_value_heads` and `head_dim`, the last two filled in where
        HF derives them, and `q_rows`, `kv_rows`: output rows of the q and of the k or v projection.

    Raises:
        ValueError: naming a field that is missing, no positive integer, or does not divide.
    """
    dims = {name: size_of(hf_config, name) for name in _SIZES}
    heads, hidden_size = dims["num_attention_heads"], dims["hidden_size"]
    is_null = hf_config.get("num_key_value_heads", 0) is None
    groups = heads if is_null else size_of(hf_config, "num_key_value_heads")
    if heads % groups:
        refuse(f"num_key_value_heads={groups}", f"must divide num_attention_heads={heads}")
    if hf_config.get("head_dim") is not None:
        head_dim = size_of(hf_config, "head_dim")
    else:
        head_dim, rest = divmod(hidden_size, heads)
        if rest:
            valid = f"must divide hidden_size={hidden_size} when head_dim is not given"
            refuse(f"num_attention_heads={heads}", valid)
    dims |= {"num_key_value_heads": groups, "head_dim": head_dim}
    return dims | {"q_rows": heads * head_dim, "kv_rows": groups * head_dim}


def latent_dims(hf_config: HfConfig) -> Dims:
    """Sizes of a decoder with multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Returns:
        The config's own sizes, and `q_rows`, `kv_down_rows`, `kv_up_rows`, `out_columns`: rows of
        the projections of queries, to and from the shared latent, columns of the output's.

    Raises:
        ValueError: naming a field that is missing or no positive integer.
    """
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    dims = {name: size_of(hf_config, name) for name in (*_SIZES, *names)}
    if hf_config["q_lora_rank"] is not None:
        dims["q_lora_rank"] = size_of(hf_config, "q_lora_rank")
    heads, rope, value = dims["num_attention_heads"], dims["qk_rope_head_dim"], dims["v_head_dim"]
    content = dims["qk_nope_head_dim"]
    return dims | {
        "num_key_value_heads": heads,
        "q_rows": heads * (content + rope),
        "kv_down_rows": dims["kv_lora_rank"] + rope,
        "kv_up_rows": heads * (content + value),
        "out_columns": heads * value,
    }


def expert_count(hf_config: HfConfig) -> int:
    """Routed experts of a layer, under whichever of HF's names the config has them."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    found = [name for name in names if name in hf_config]
    if not found:
        refuse(names[0], "missing")
    _agreed("num_experts", [hf_config[name] for name in found])
    return size_of(hf_config, found[0])


def size_of(hf_config: HfConfig, name: str) -> int:
    """A field that must be a positive integer."""
    if name not in hf_config:
        refuse(name, "missing")
    value = hf_config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        refuse(f"{name}={value!r}", "must be a positive integer")
    return value


def _rope_block(hf_config: HfConfig, name: str) -> HfConfig:
    block = hf_config.get(name)
    if block is None:
        return {}
    if not isinstance(block, Mapping):
        refuse(f"{name}={block!r}", "must be null or an object")
    if any(isinstance(value, Mapping) for value in block.values()):
        refuse(f"{name}={block!r}", "settings per layer type are not covered")
    return block


def _rope_type(block: HfConfig) -> object:
    names = [block[key] for key in ("rope_type", "type") if block.get(key) is not None]
    return _agreed("rope_type", names or ["default"])


def _agreed(field: str, values: list[object]) -> object:
    if any(value != values[0] for value in values):
        refuse(field, f"given more than once, as {values}")
    return values[0]


def _number(field: str, blocks: list[HfConfig], default: Optional[float] = None) -> float:
    """The number that all blocks which have `field` agree on."""
    given = [block[field] for block in blocks if block.get(field) is not None]
    value = _agreed(field, given or [default])
    if value is None:
        refuse(field, "missing or null, at the top and in rope_parameters alike")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(f"{field}={value!r}", "must be a number")
    return float(value)


def refuse(what: str, reason: str) -> NoReturn:
    """Every refusal of a `config.json` has this form."""
    raise UserError(f"HF config {what}: {reason}")
