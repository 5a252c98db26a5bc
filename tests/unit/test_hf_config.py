import json
import re
import sys
import types

import pytest

from megatron_zero.config import ArchitectureConfig, ModelConfig
from megatron_zero.hf_config import read_hf_config, with_vocab_size

MADE = ModelConfig(
    init="random",
    tokenizer="characters",
    architecture=ArchitectureConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=3),
)
DISK = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def refusal(path: str) -> str:
    with pytest.raises(ValueError) as caught:
        read_hf_config(ModelConfig(path=path))
    assert str(caught.value).startswith(f"model.path={path!r}: ")
    return str(caught.value)


def test_a_local_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DISK))
    assert read_hf_config(ModelConfig(path=str(tmp_path))) == DISK
    random = ModelConfig(path=str(tmp_path), init="random")
    assert read_hf_config(random) == DISK


def test_folders_that_are_no_model(tmp_path):
    assert "no config.json" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**DISK, "model_type": "x"}))
    assert read_hf_config(ModelConfig(path=str(tmp_path)))["model_type"] == "x"
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vocab_size": 3}')
    assert "must have hidden_size, intermediate_size" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "must have model_type" in refusal(str(tmp_path))


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "../none", "a/b/c", "a b", "~/none"])
def test_paths_are_never_asked_from_the_hub(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    assert "no such folder" in refusal(path)


def fake_hub(monkeypatch, answer) -> list[tuple[str, list[str]]]:
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(DISK))
    asked = fake_hub(monkeypatch, tmp_path)
    assert read_hf_config(ModelConfig(path="Qwen/Qwen2.5-Math-1.5B")) == DISK
    assert asked == [("Qwen/Qwen2.5-Math-1.5B", ["config.json"])]


@pytest.mark.parametrize("error", [FileNotFoundError("offline\nand more"), ValueError("offline")])
def test_a_hub_that_cannot_be_reached(error, monkeypatch):
    fake_hub(monkeypatch, error)
    message = refusal("Qwen/Qwen2.5-Math-1.5B")
    assert message.endswith("the hub: offline")


def test_the_real_hub_client_offline(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "had from the hub" in refusal("nobody/nothing-of-this-name")
    assert "had from the hub" in refusal("nobody/-bad-")


def test_a_made_config_is_what_transformers_understands():
    transformers = pytest.importorskip("transformers")
    made = with_vocab_size(read_hf_config(MADE), 100, MADE)
    parsed = transformers.Qwen2Config(**{k: v for k, v in made.items() if k != "architectures"})
    assert (parsed.hidden_size, parsed.num_attention_heads, parsed.num_key_value_heads) == (
        96,
        6,
        3,
    )
    assert parsed.rope_parameters["rope_theta"] == 10000.0
    assert set(parsed.layer_types) == {"full_attention"} and len(parsed.layer_types) == 4
    assert parsed.tie_word_embeddings is True and parsed.vocab_size == 128
    for key in made.keys() - {"architectures", "dtype", "model_type"}:
        assert getattr(parsed, key) == made[key], key


def test_a_made_config_has_every_size_of_the_architecture():
    made = read_hf_config(MADE)
    names = set(ArchitectureConfig.__dataclass_fields__) - {"rope_theta"}
    assert names <= made.keys()
    assert made["vocab_size"] == 0 and made["dtype"] == "bfloat16"
    assert (
        read_hf_config(ModelConfig(init="random", tokenizer="x", dtype="fp32"))["dtype"]
        == "float32"
    )


@pytest.mark.parametrize(("tokens", "size"), [(1, 128), (128, 128), (129, 256), (151665, 151680)])
def test_an_open_vocabulary_is_rounded_up(tokens, size):
    made = read_hf_config(MADE)
    assert with_vocab_size(made, tokens, MADE)["vocab_size"] == size
    assert made["vocab_size"] == 0


def test_a_set_vocabulary_stays_and_must_hold_the_tokenizer():
    made = {**read_hf_config(MADE), "vocab_size": 100}
    assert with_vocab_size(made, 100, MADE)["vocab_size"] == 100
    message = (
        "model.architecture.vocab_size=100: must be 0, or at least the 101 tokens of "
        "model.tokenizer='characters'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        with_vocab_size(made, 101, MADE)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            "",
            "model.path='m': its tokenizer has 513 tokens, where its config.json has "
            "vocab_size=512",
        ),
        (
            "other",
            "model.tokenizer='other': 513 tokens, where model.path='m' has vocab_size=512; "
            "must have at most as many",
        ),
    ],
)
def test_a_tokenizer_larger_than_the_model_names_the_settings_in_use(tokenizer, message):
    assert with_vocab_size(DISK, 512, ModelConfig(path="m", tokenizer=tokenizer)) == DISK
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        with_vocab_size(DISK, 513, ModelConfig(path="m", tokenizer=tokenizer))
