"""What belongs to a model besides its weights goes wherever the model goes."""

import json
from pathlib import Path

import pytest
import transformers
from convert_reference import hf_tensors, qwen2_config

from megatron_zero.config import ModelConfig
from megatron_zero.convert import hf_to_megatron, megatron_to_hf
from megatron_zero.convert.hf_dir import carried_files, copy_carried_files
from megatron_zero.convert.safetensors_io import SafetensorsSource, write_hf_checkpoint
from megatron_zero.data.arithmetic import build_character_tokenizer
from megatron_zero.model_files import complete_hf_config, write_model_files

CODE = ["configuration_own.py", "modeling_own.py"]  # only where auto_map names classes
TOKENIZER = [
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "own.tiktoken",
    "spiece.model",
    "special_tokens_map.json",
    "tekken.json",
    "tokenization_own.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
]
MODEL = ["LICENSE.txt", "NOTICE", "generation_config.json", "preprocessor_config.json"]
LEFT = [
    ".gitattributes",
    "README.md",  # the card of other weights
    "adapter_config.json",  # of weights that are not carried
    "consolidated.00.pth",
    "original/params.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "training_args.bin",
]
AUTO_MAP = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}


def write_folder(folder: Path, *, auto_map: bool) -> Path:
    """A folder with all of it, and a tiny model's weights."""
    for name in [*CODE, *TOKENIZER, *MODEL, *LEFT]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"of": "{name}"}}')
    config = qwen2_config() | (AUTO_MAP if auto_map else {})
    (folder / "config.json").write_text(json.dumps(config))
    write_hf_checkpoint(folder / "weights", sorted(hf_tensors(config).items()))
    (folder / "weights" / "model.safetensors").rename(folder / "model.safetensors")
    (folder / "weights").rmdir()
    return folder


def files(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("auto_map", [True, False])
def test_what_is_carried(tmp_path: Path, auto_map: bool) -> None:
    source = write_folder(tmp_path / "model", auto_map=auto_map)
    code = CODE if auto_map else []
    tokenizer = [name for name in TOKENIZER if auto_map or not name.endswith(".py")]
    carried = [str(path) for path in carried_files(source)]
    assert sorted(carried) == sorted([*code, *tokenizer, *MODEL])
    without = [str(path) for path in carried_files(source, with_tokenizer=False)]
    assert sorted(without) == sorted([*code, *MODEL])
    (tmp_path / "copy").mkdir()
    copy_carried_files(source, tmp_path / "copy")
    assert files(tmp_path / "copy") == {name: files(source)[name] for name in carried}


def test_a_tokenizers_own_code_is_named_in_its_settings(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", auto_map=False)
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Path("tokenization_own.py") in carried_files(source)


def test_conversions_carry_it_both_ways(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", auto_map=True)
    hf_to_megatron(source, tmp_path / "megatron", progress=False)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    found, original = files(tmp_path / "back"), files(source)
    expected = [*CODE, *TOKENIZER, *MODEL, "config.json", "model.safetensors"]
    assert found == {name: original[name] for name in expected}


@pytest.mark.parametrize("given", ["", "same folder"])
def test_a_run_and_its_export_have_every_chat_template(tmp_path: Path, given: str) -> None:
    """Saved by transformers, read by transformers, the way through a run between them."""
    tokenizer = build_character_tokenizer()
    templates = {"default": "{{ messages }}", "rag": "{{ documents }}", "tool_use": "{{ tools }}"}
    tokenizer.chat_template = templates
    source = tmp_path / "model"
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates").is_dir()
    (source / "config.json").write_text(json.dumps(qwen2_config(vocab_size=100)))
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 7], "top_k": 20}')
    model = ModelConfig(path=str(source), tokenizer=given and str(source))
    loaded = transformers.AutoTokenizer.from_pretrained(source)
    hf_config = complete_hf_config(model, loaded)
    write_model_files(tmp_path / "run", model, hf_config, loaded, source, (1, 7))
    weights = hf_tensors(qwen2_config()).items()
    carried = sorted((tmp_path / "run").iterdir())
    write_hf_checkpoint(tmp_path / "export", weights, copy_files=carried)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert exported.chat_template == templates
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "export")
    assert settings.eos_token_id == [1, 7] and settings.top_k == 20
    assert SafetensorsSource(tmp_path / "export").names()


def test_a_run_is_converted_by_its_export_and_says_which(tmp_path: Path) -> None:
    run = tmp_path / "run"
    export = run / "hf" / "step_000020"
    export.mkdir(parents=True)
    (run / "config.yaml").touch()
    (export / "config.json").touch()
    with pytest.raises(ValueError, match=r"run has no config\.json; did you mean .*step_000020\?"):
        hf_to_megatron(run, tmp_path / "out", progress=False)
    (export / "config.json").unlink()
    with pytest.raises(ValueError, match=r"run has no config\.json$"):
        hf_to_megatron(run, tmp_path / "out", progress=False)
