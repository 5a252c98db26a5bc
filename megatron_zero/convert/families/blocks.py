"""Rules that families share: embeddings, attention, MLP, mixture of experts, as functions of data.

Megatron names are those of the local layer spec; aliases are Transformer Engine's. A layer's rules
are made for a `Place`: in the decoder, or in a multi-token-prediction layer behind it.
"""

from dataclasses import dataclass
from typing import Optional

from megatron_zero.convert.hf_config import ConfigCheck
from megatron_zero.convert.rules import HfTensor, Rule

Rules = tuple[Rule, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a layer's tensors stand on both sides, and which layers of the model are meant."""

    hf: str = "model.layers.{layer}."
    megatron: str = "decoder.layers.{layer}."
    layers: str = "all"

    def copy(
        self,
        megatron: str,
        hf: str,
        shape: tuple[str, ...],
        *,
        init: str = "normal",
        **rule: object,
    ) -> Rule:
        """One tensor that is the same on both sides."""
        alias = rule.pop("alias", None)
        return Rule(
            megatron=self.megatron + megatron,
            hf=(HfTensor(self.hf + hf, shape, init),),
            layers=self.layers,
            alias=self.megatron + alias if isinstance(alias, str) else None,
            **rule,  # type: ignore[arg-type]
        )

    def join(self, kind: str, megatron: str, hf: tuple[HfTensor, ...]) -> Rule:
        """Several HF tensors packed by `kind` along dim 0, which tensor parallelism splits."""
        own = tuple(HfTensor(self.hf + t.name, t.shape, t.init) for t in hf)
        return Rule(
            megatron=self.megatron + megatron, hf=own, kind=kind, tp_dim=0, layers=self.layers
        )

    def norm(self, megatron: str, hf: str, size: str, alias: Optional[str] = None) -> Rule:
        """The weight of an RMSNorm."""
        return self.copy(megatron, hf, (size,), init="ones", alias=alias)


DECODER = Place()
EMBEDDING = HfTensor("model.embed_tokens.weight", ("vocab_size", "hidden_size"))
LM_HEAD = HfTensor("lm_head.weight", ("vocab_size", "hidden_size"))


def _vocabulary(megatron: str, tensor: HfTensor, *, exported: bool = True) -> Rule:
    return Rule(megatron=megatron, hf=(tensor,), kind="vocab", tp_dim=0, exported=exported)


FIRST: Rules = (_vocabulary("embedding.word_embeddings.weight", EMBEDDING),)
LAST: Rules = (
    Rule(
        megatron="decoder.final_layernorm.weight",
        hf=(HfTensor("model.norm.weight", ("hidden_size",), "ones"),),
    ),
)
# Tied: with several pipeline stages the last one holds a copy of the embedding.
TIED: Rules = (_vocabulary("output_layer.weight", EMBEDDING, exported=False),)
UNTIED: Rules = (_vocabulary("output_layer.weight", LM_HEAD),)


def grouped_query_attention(
    *, qkv_bias: bool = False, qk_norm: bool = False, place: Place = DECODER
) -> Rules:
    """Input norm, q, k, v, output projection; biases on q, k, v or norms of q, k where asked."""

    def qkv(part: str, rest: tuple[str, ...], init: str) -> Rule:
        sizes = (("q", "q_rows"), ("k", "kv_rows"), ("v", "kv_rows"))
        tensors = tuple(
            HfTensor(f"self_attn.{x}_proj.{part}", (rows, *rest), init) for x, rows in sizes
        )
        return place.join("qkv", f"self_attention.linear_qkv.{part}", tensors)

    fused = "self_attention.linear_qkv.layer_norm_weight"
    rules = [
        place.norm("input_layernorm.weight", "input_layernorm.weight", "hidden_size", fused),
        qkv("weight", ("hidden_size",), "normal"),
    ]
    if qkv_bias:
        rules.append(qkv("bias", (), "zeros"))
    for x in "qk" if qk_norm else "":
        name = f"self_attention.{x}_layernorm.weight"
        rules.append(place.norm(name, f"self_attn.{x}_norm.weight", "head_dim"))
    out = ("hidden_size", "q_rows")
    rules.append(
        place.copy("self_attention.linear_proj.weight", "self_attn.o_proj.weight", out, tp_dim=1)
    )
    return tuple(rules)


def gate_up_down(
    megatron: str,
    hf: str,
    size: str,
    *,
    place: Place = DECODER,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Rules:
    """The two Megatron tensors of one SwiGLU MLP of `size` positions, without a norm."""
    gate, up, down = names
    rows = (size, "hidden_size")
    first = (HfTensor(f"{hf}.{gate}.weight", rows), HfTensor(f"{hf}.{up}.weight", rows))
    columns = ("hidden_size", size)
    return (
        place.join("gate_up", f"{megatron}.linear_fc1.weight", first),
        place.copy(f"{megatron}.linear_fc2.weight", f"{hf}.{down}.weight", columns, tp_dim=1),
    )


def swiglu(*, place: Place = DECODER) -> Rules:
    """A dense layer's norm and MLP."""
    fused = "mlp.linear_fc1.layer_norm_weight"
    norm = ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden_size")
    return (place.norm(*norm, fused), *gate_up_down("mlp", "mlp", "intermediate_size", place=place))


def experts(
    *,
    hf: str = "mlp",
    size: str = "moe_intermediate_size",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    place: Place = DECODER,
) -> Rules:
    """A mixture layer's norm, router and routed experts; `num_experts` counts `{expert}`."""
    norm = ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden_size")
    router = ("mlp.router.weight", f"{hf}.gate.weight", ("num_experts", "hidden_size"))
    one = ("mlp.experts.local_experts.{expert}", hf + ".experts.{expert}", size)
    return (place.norm(*norm), place.copy(*router), *gate_up_down(*one, place=place, names=names))


def dense(attention: Rules) -> Rules:
    """A whole model of alike layers: `attention`, then SwiGLU."""
    return (*FIRST, *attention, *swiglu(), *LAST)


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


def checks(*, attention_bias: bool = False) -> tuple[ConfigCheck, ...]:
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
        **dict.fromkeys(("hidden_dropout", "embd_pdrop", "resid_pdrop"), (0, None)),
    }
    return (
        ConfigCheck("hidden_act", ("silu",), "the MLP is SwiGLU"),
        ConfigCheck("use_sliding_window", (False,), whole),
        ConfigCheck("layer_types", ("full_attention",), whole),
        ConfigCheck("attention_bias", (attention_bias,), f"biases: {bias}"),
        ConfigCheck("mlp_bias", (False,), "the MLP has no biases"),
        ConfigCheck("attention_dropout", (0, None), "the policy runs without dropout"),
        ConfigCheck("tie_word_embeddings", (True, False), "embeddings are tied or not"),
        *(ConfigCheck(name, (*ok, None), "no table covers it") for name, ok in foreign.items()),
    )
