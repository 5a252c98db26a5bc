"""Rules that families share: embeddings, attention, MLP, mixture of experts, as functions of data.

Megatron names are those of the local layer spec; aliases are Transformer Engine's. A layer's rules
are made for a `Place`: in the decoder, or in a multi-token-prediction layer behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from megatron_zero.convert.hf_config import Checks
from megatron_zero.convert.rules import Family, HfTensor, Rule

Rules = tuple[Rule, ...]
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a layer's tensors stand on both sides, and which layers of the model are meant."""

    hf: str = "model.layers.{layer}."
    megatron: str = "decoder.layers.{layer}."
    layers: str = "all"

    def rule(
        self,
        megatron: str,
        hf: "dict[str, str]",
        *,
        init: str = "normal",
        alias: Optional[str] = None,
        **rule: Any,
    ) -> Rule:
        """A `Rule` for names at this place; `hf` is name -> sizes, as in "q_rows hidden_size"."""
        return Rule(
            megatron=self.megatron + megatron,
            hf=tuple(HfTensor(self.hf + name, tuple(of.split()), init) for name, of in hf.items()),
            alias=alias and self.megatron + alias,
            layers=self.layers,
            **rule,
        )

    def norm(
        self, megatron: str, hf: str, size: str = "hidden_size", alias: Optional[str] = None
    ) -> Rule:
        """The weight of an RMSNorm."""
        return self.rule(megatron, {hf: size}, init="ones", alias=alias)


DECODER, WHOLE = Place(), Place(hf="", megatron="")
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROW_PER_TOKEN: "dict[str, Any]" = {"kind": "vocab", "tp_dim": 0}
_HEAD, _SIZES = "output_layer.weight", "vocab_size hidden_size"

FIRST = (WHOLE.rule("embedding.word_embeddings.weight", {EMBEDDING: _SIZES}, **_ROW_PER_TOKEN),)
LAST = (WHOLE.norm("decoder.final_layernorm.weight", "model.norm.weight"),)
# Tied: with several pipeline stages the last one holds a copy of the embedding.
TIED = (WHOLE.rule(_HEAD, {EMBEDDING: _SIZES}, exported=False, **_ROW_PER_TOKEN),)
UNTIED = (WHOLE.rule(_HEAD, {LM_HEAD: _SIZES}, **_ROW_PER_TOKEN),)


def grouped_query_attention(*, qkv_bias: bool = False, qk_norm: bool = False) -> Rules:
    """Input norm, q, k, v, output projection; biases on q, k, v or norms of q, k where asked."""

    def qkv(part: str, rest: str, init: str) -> Rule:
        rows = {"q": "q_rows", "k": "kv_rows", "v": "kv_rows"}
        tensors = {f"self_attn.{x}_proj.{part}": f"{rows[x]} {rest}" for x in rows}
        name = f"self_attention.linear_qkv.{part}"
        return DECODER.rule(name, tensors, kind="qkv", tp_dim=0, init=init)

    fused = "self_attention.linear_qkv.layer_norm_weight"
    rules = [
        DECODER.norm("input_layernorm.weight", "input_layernorm.weight", alias=fused),
        qkv("weight", "hidden_size", "normal"),
    ]
    if qkv_bias:
        rules.append(qkv("bias", "", "zeros"))
    for x in "qk" if qk_norm else "":
        name = f"self_attention.{x}_layernorm.weight"
        rules.append(DECODER.norm(name, f"self_attn.{x}_norm.weight", "head_dim"))
    out = {"self_attn.o_proj.weight": "hidden_size q_rows"}
    return (*rules, DECODER.rule("self_attention.linear_proj.weight", out, tp_dim=1))


def gate_up_down(
    place: Place, megatron: str, hf: str, size: str, names: "tuple[str, ...]" = GATE_UP_DOWN
) -> Rules:
    """The two Megatron tensors of one SwiGLU MLP of `size` positions, without a norm."""
    gate, up, down = (f"{hf}.{name}.weight" for name in names)
    first = dict.fromkeys((gate, up), f"{size} hidden_size")
    return (
        place.rule(f"{megatron}.linear_fc1.weight", first, kind="gate_up", tp_dim=0),
        place.rule(f"{megatron}.linear_fc2.weight", {down: f"hidden_size {size}"}, tp_dim=1),
    )


def _mlp_norm(place: Place, alias: Optional[str] = None) -> Rule:
    name = "post_attention_layernorm.weight"
    return place.norm("pre_mlp_layernorm.weight", name, alias=alias)


def swiglu(place: Place = DECODER) -> Rules:
    """A dense layer's norm and MLP."""
    norm = _mlp_norm(place, "mlp.linear_fc1.layer_norm_weight")
    return (norm, *gate_up_down(place, "mlp", "mlp", "intermediate_size"))


def experts(
    place: Place = DECODER,
    hf: str = "mlp",
    size: str = "moe_intermediate_size",
    names: "tuple[str, ...]" = GATE_UP_DOWN,
) -> Rules:
    """A mixture layer's norm, router and routed experts; `num_experts` counts `{expert}`."""
    router = place.rule("mlp.router.weight", {f"{hf}.gate.weight": "num_experts hidden_size"})
    one = ("mlp.experts.local_experts.{expert}", hf + ".experts.{expert}", size, names)
    return (_mlp_norm(place), router, *gate_up_down(place, *one))


ROTARY = (  # buffers that old checkpoints stored
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
    r"lm_head\.weight",  # tied: some checkpoints store it again; untied: a rule maps it
)

DEFAULTS: dict[str, object] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def decoder(
    model_type: str,
    architecture: str,
    layers: Rules,
    *,
    after: Rules = (),
    attention_bias: bool = False,
    checks: Optional[Checks] = None,
    defaults: Optional[Mapping[str, object]] = None,
    **family: Any,
) -> Family:
    """A `Family`: embedding, `layers`, final norm, what comes `after`, output layer, tied or not.

    `checks` and `defaults` are added to those of every family.
    """
    return Family(
        model_type=model_type,
        rules=(*FIRST, *layers, *LAST, *after),
        tied_rules=TIED,
        untied_rules=UNTIED,
        checks=common_checks(architecture, attention_bias=attention_bias) | (checks or {}),
        defaults={**DEFAULTS, **(defaults or {})},
        ignored=ROTARY,
        **family,
    )


def common_checks(architecture: str, *, attention_bias: bool) -> Checks:
    """What every family's config must say or leave out.

    The second half are fields by which other architectures change the computation; a config that
    sets one is not the model that the rules describe.
    """
    bias = "q, k and v have biases, the output has none" if attention_bias else "there are none"
    whole = "attention is over the whole prefix"
    foreign = {
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (None,)),
        **dict.fromkeys(("query_pre_attn_scalar", "clip_qkv", "alibi", "attention_chunk_size"), ()),
        **dict.fromkeys(("logit_scale", "logits_scaling", "residual_multiplier"), (1, None)),
        **dict.fromkeys(("embedding_multiplier", "attention_multiplier"), (1, None)),
        **dict.fromkeys(("qk_layernorm", "use_qk_norm", "parallel_attn", "use_mrope"), (False,)),
        **dict.fromkeys(("no_rope_layers", "layer_norm_eps", "norm_type"), ()),
        "dual_chunk_attention_config": (),  # the engine would follow it
        **dict.fromkeys(("hidden_dropout", "embd_pdrop", "resid_pdrop"), (0, None)),
    }
    return {
        "architectures": ((architecture, None), "the table is of one class"),
        "hidden_act": (("silu",), "the MLP is SwiGLU"),
        "use_sliding_window": ((False,), whole),
        "layer_types": (("full_attention",), whole),
        "attention_bias": ((attention_bias,), f"biases: {bias}"),
        "mlp_bias": ((False,), "the MLP has no biases"),
        "attention_dropout": ((0, None), "the policy runs without dropout"),
        "tie_word_embeddings": ((True, False), "embeddings are tied or not"),
        **{name: ((*ok, None), "no table covers it") for name, ok in foreign.items()},
    }
