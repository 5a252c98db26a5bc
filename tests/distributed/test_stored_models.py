"""Files that contradict their config: one model for training, conversion, the engine, transformers.

Each model is begun from its HF folder and, converted, from a Megatron one; both exports must hold
what the files hold and say so.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_zero.convert import hf_to_megatron
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.data.arithmetic import build_character_tokenizer
from tests import families
from tests.distributed.stored_worker import PROMPT
from tests.launch import REPOSITORY, torchrun

WORKER = REPOSITORY / "tests" / "distributed" / "stored_worker.py"
SCALE = "_scale_inv"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# name -> family, and what the config says besides
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "other_head": ("qwen2_yarn", {"tie_word_embeddings": True}),
    "same_head": ("qwen2_tied", {}),
    "no_mtp": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
    "with_mtp": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
    "unlike_types": ("qwen2", {}),
    "eight_bits": (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}},
    ),
}
# folder -> what conversion or training must say of it; of the others nothing
SAID = {
    "other_head": "the model is untied",
    "other_head_megatron": "the model is untied",
    "no_mtp": "the model has none",
    "no_mtp_megatron": "the model has none",
    "with_mtp": "these layers are not trained",
    "with_mtp_megatron": "these layers are not trained",
    "eight_bits": "8-bit blocks",
}
NAMES = [f"{name}{ending}" for name in MODELS for ending in ("", "_megatron")]
NARROW = ("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj", "layers.2.input_layernorm")


def write(name: str, directory: Path) -> None:
    family, changes = MODELS[name]
    families.write(family, directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    if name == "same_head":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    if name == "unlike_types":
        for key in tensors:
            if any(part in key for part in NARROW):
                tensors[key] = tensors[key].bfloat16()
    if name == "with_mtp":
        mapping = mapping_for(config)
        fresh = RandomSource(mapping, 0)
        tensors |= {key: fresh.read(key) for key in mapping.hf_names() if key not in tensors}
        tensors |= {c: tensors[name].clone() for c, name in mapping.copies().items()}
    if name == "eight_bits":
        for key in [key for key in tensors if key.endswith("down_proj.weight")]:
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)
            blocks = [-(-size // 32) for size in tensors[key].shape]
            tensors[key + SCALE] = torch.full(blocks, 0.25)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    build_character_tokenizer().save_pretrained(directory)


def output_of(folder: Path, name: str) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(50)[None]).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL, MODEL_megatron, runs/ of both, and `said`: what conversion and training said."""
    folder: Path = tmp_path_factory.mktemp("stored")
    said: dict[str, list[str]] = {}
    for name in MODELS:
        write(name, folder / name)
        told = hf_to_megatron(folder / name, folder / f"{name}_megatron", progress=False)
        said[name], said[f"{name}_megatron"] = [], told[:-1]  # the last says what was written
    models = [folder / name for name in NAMES]
    output = torchrun(1, WORKER, folder / "runs", folder / "other_head", *models)
    for line in output.splitlines():
        if line.startswith("note: "):
            where, what = line.removeprefix("note: ").split(": ", 1)
            said[Path(where).name].append(what)
    (folder / "said").write_text(json.dumps(said))
    return folder


def exported(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "hf" / "step_000001"


@pytest.mark.parametrize("name", NAMES)
def test_an_export_holds_what_the_files_held(folder: Path, name: str) -> None:
    model = name.removesuffix("_megatron")
    expected = load_file(folder / model / "model.safetensors")
    if model == "same_head":  # is the embedding, and stored once
        del expected[HEAD]
    for key in [key for key in expected if key.startswith("model.layers.4.")]:
        del expected[key]  # multi-token prediction, behind four layers
    for key in [key for key in expected if key.endswith(SCALE)]:
        weight = key.removesuffix(SCALE)
        expected[weight] = expected[weight].float() * 0.25
        del expected[key]
    found = load_file(exported(folder, name) / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.float()), key


@pytest.mark.parametrize("name", NAMES)
def test_its_config_says_so(folder: Path, name: str) -> None:
    model = name.removesuffix("_megatron")
    config = json.loads((exported(folder, name) / "config.json").read_text())
    assert config["tie_word_embeddings"] == (model == "same_head")
    assert not config.get("num_nextn_predict_layers") and "quantization_config" not in config
    said = json.loads((folder / "said").read_text())[name]
    assert len(said) == (name in SAID) and all(SAID[name] in line for line in said)


@pytest.mark.parametrize("name", ["other_head", "no_mtp"])
def test_transformers_computes_the_same_before_and_after(folder: Path, name: str) -> None:
    expected = output_of(folder, name)
    found = output_of(folder, f"runs/{name}/hf/step_000001")
    assert torch.equal(found, expected)


def test_the_engine_started_from_the_files_agrees_with_transformers(folder: Path) -> None:
    """As `eval` starts it: with the stored output layer, and at stretched positions."""
    path = folder / "other_head"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    rows = json.loads((folder / "runs" / "drawn.json").read_text())
    assert sum(len(tokens) for tokens, _ in rows) > 50
    for i, (tokens, logprobs) in enumerate(rows):
        ids = torch.tensor([[*PROMPT[i:], *tokens]])
        with torch.no_grad():
            expected = model(ids).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (torch.tensor(logprobs) - expected).abs().max() <= 1e-5
