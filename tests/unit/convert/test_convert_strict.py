"""What is refused: unmapped, missing and misshapen tensors, and configs the table does not hold."""

import pytest
import torch
from convert_reference import DictSource, hf_tensors, qwen2_config

from megatron_zero.convert.families import family_for, mapping_for
from megatron_zero.convert.hf_config import decoder_dims, rope_settings

Q_BIAS = "model.layers.1.self_attn.q_proj.bias"
LENGTH = "original_max_position_embeddings"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 64}
QKV_BIAS = "decoder.layers.1.self_attention.linear_qkv.bias"


def check(hf: dict[str, torch.Tensor], **changes: object) -> None:
    mapping_for(qwen2_config(**changes)).check_source(DictSource(hf))


def test_unmapped_hf_tensor_is_named() -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    with pytest.raises(ValueError, match=name):
        check(hf_tensors(qwen2_config()) | {name: torch.ones(8)})


def test_layer_beyond_the_config_is_left_over() -> None:
    hf = hf_tensors(qwen2_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"model\.layers\.2\..* and 7 more"):
        check(hf)


def test_missing_hf_tensor_is_named() -> None:
    hf = hf_tensors(qwen2_config())
    del hf[Q_BIAS]
    with pytest.raises(ValueError, match=f"lacks {Q_BIAS}"):
        check(hf)
    with pytest.raises(ValueError, match=Q_BIAS):
        mapping_for(qwen2_config()).to_megatron_shard(QKV_BIAS, DictSource(hf), 0, 2)


def test_head_of_an_untied_model_may_not_be_missing() -> None:
    hf = hf_tensors(qwen2_config(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        check(hf, tie_word_embeddings=False)


def test_wrong_hf_shape_is_named_by_check_and_by_load() -> None:
    hf = hf_tensors(qwen2_config()) | {Q_BIAS: torch.zeros(31)}
    message = rf"{Q_BIAS} has shape \[31\], expected \[32\]"
    with pytest.raises(ValueError, match=message):
        check(hf)
    with pytest.raises(ValueError, match=message):
        mapping_for(qwen2_config()).to_megatron_shard(QKV_BIAS, DictSource(hf), 0, 2)


def test_rotary_buffers_are_harmless() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    check(hf_tensors(qwen2_config()) | {name: torch.ones(4)})


def test_unknown_megatron_name() -> None:
    mapping, name = mapping_for(qwen2_config()), "decoder.layers.2.input_layernorm.weight"
    calls = (
        lambda: mapping.full_shape(name),
        lambda: mapping.to_hf(name, torch.zeros(24)),
        lambda: mapping.merge_shards(name, [torch.zeros(24)]),
        lambda: mapping.to_megatron_shard(name, DictSource({}), 0, 1),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"decoder\.layers\.2.*no rule of qwen2"):
            call()


def test_wrong_megatron_shapes() -> None:
    mapping = mapping_for(qwen2_config())
    with pytest.raises(ValueError, match=rf"{QKV_BIAS} has shape \[63\], expected \[64\]"):
        mapping.to_hf(QKV_BIAS, torch.zeros(63))
    with pytest.raises(ValueError, match=rf"{QKV_BIAS} of tensor-parallel rank 1 has shape"):
        mapping.merge_shards(QKV_BIAS, [torch.zeros(32), torch.zeros(31)])


def test_sizes_that_do_not_divide() -> None:
    mapping = mapping_for(qwen2_config())
    with pytest.raises(ValueError, match=r"word_embeddings.*53 positions of dim 0.*size 2"):
        mapping.shard_shape("embedding.word_embeddings.weight", 2)
    # 80 packed rows divide by 16, but gate and up of 40 rows each do not
    with pytest.raises(ValueError, match=r"linear_fc1.*40 positions of dim 0.*size 16"):
        mapping.shard_shape("decoder.layers.0.mlp.linear_fc1.weight", 16)


def test_padded_vocab_below_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="padded_vocab_size=52"):
        mapping_for(qwen2_config(), 52)


def test_unknown_model_type_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"model_type='gpt2': must be one of .*qwen2"):
        family_for({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="model_type=None"):
        family_for({})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["Qwen2ForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("use_mrope", True),
        ("attention_bias", False),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("tie_word_embeddings", None),
        ("quantization_config", {"quant_method": "awq"}),
        ("hidden_size", "24"),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 3),
        ("rope_theta", "1e6"),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_config_field_that_changes_the_model_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"HF config {field}="):
        mapping_for(qwen2_config(**{field: value}))


def test_required_size_is_named_when_missing() -> None:
    config = qwen2_config()
    del config["num_key_value_heads"]
    with pytest.raises(ValueError, match="num_key_value_heads: missing"):
        mapping_for(config)


LONG = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear': must be one of"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": LONG}, "rope_type='longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "rope_type='mrope'"),
        ({"rope_scaling": {"type": "llama3"} | LLAMA3}, "rope_type='llama3'"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
            "rope_type: given more than once",
        ),
        # as when the type was forgotten
        ({"rope_scaling": {"factor": 4.0}}, "rope_parameters.factor: rope_type='default' has no"),
        (
            {"rope_scaling": YARN | {"finetuned": True}},
            "rope_parameters.finetuned: rope_type='yarn'",
        ),
        ({"rope_scaling": YARN | {"factor": None}}, "factor: missing or null"),
        ({"rope_scaling": YARN | {"beta_fast": None}}, "beta_fast: missing or null"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor=0.5: must be at least 1.0"),
        ({"rope_scaling": YARN | {"beta_slow": 0}}, "beta_slow=0.0: must be above 0"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor='4': must be a number"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate='no': must be true or false"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, f"{LENGTH}: missing"),
        ({"rope_scaling": YARN, LENGTH: 32}, f"{LENGTH}: given more than once"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config="),
    ],
)
def test_other_positions_are_refused_by_name(rope: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        mapping_for(qwen2_config(**rope))
    assert str(error.value).startswith(f"HF config {message}")


def test_yarn_is_read_in_both_spellings() -> None:
    old = mapping_for(qwen2_config(rope_scaling=YARN)).rope
    new = mapping_for(qwen2_config(rope_parameters=YARN | {"rope_theta": 1e6})).rope
    assert old == new and old.theta == 1e6 and old.truncate
    assert old.scaling == {"factor": 4.0, LENGTH: 64.0}
    rest = {"truncate": False, "mscale": None, "attention_factor": 1.5}
    other = mapping_for(qwen2_config(rope_scaling=YARN | rest)).rope
    assert not other.truncate and other.scaling == old.scaling | {"attention_factor": 1.5}
    bare = {"rope_type": "yarn", "factor": 4.0}  # of the model's own length
    made = mapping_for(qwen2_config(rope_scaling=bare, max_position_embeddings=128)).rope
    assert made.scaling == {"factor": 4.0, LENGTH: 128.0}


def test_rope_of_both_generations() -> None:
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    for config in (
        {"rope_theta": 5e5},
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        new,
        new | {"rope_theta": 5e5},
    ):
        assert rope_settings(config).theta == 5e5 and rope_settings(config).rope_type == "default"
    assert rope_settings({}, default_theta=1e4).theta == 1e4
    with pytest.raises(ValueError, match="rope_theta: missing"):
        rope_settings({})
    with pytest.raises(ValueError, match="rope_theta: given more than once"):
        rope_settings(new | {"rope_theta": 1e4})
    with pytest.raises(ValueError, match="per layer type"):
        rope_settings({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}})


def test_sizes_that_hf_derives() -> None:
    config = qwen2_config(hidden_size=32, num_key_value_heads=None)
    del config["head_dim"]
    dims = decoder_dims(config)
    assert (dims["head_dim"], dims["num_key_value_heads"], dims["kv_rows"]) == (8, 4, 32)
    with pytest.raises(ValueError, match="must divide hidden_size=30"):
        decoder_dims(config | {"hidden_size": 30})
