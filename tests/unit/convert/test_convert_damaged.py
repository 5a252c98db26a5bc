"""Weights that are damaged, or are none: the same sentence for training, evaluation, conversion."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_reference import hf_tensors, qwen2_config
from safetensors.torch import load_file, save_file

from megatron_zero.checks import UserError
from megatron_zero.config import ModelConfig
from megatron_zero.convert import hf_to_megatron, megatron_to_hf
from megatron_zero.convert.command_line import run
from megatron_zero.convert.finite import check_finite
from megatron_zero.convert.hf_dir import open_source, read_config
from megatron_zero.convert.safetensors_io import INDEX_NAME, write_hf_checkpoint
from megatron_zero.model_files import check_weights, check_weights_for_engine, stored_corrections

FILE = "model-00004-of-00008.safetensors"
TENSOR = "model.layers.0.mlp.up_proj.weight"  # in that file


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A tiny Qwen2 in several files."""
    directory, config = tmp_path / "hf", qwen2_config()
    write_hf_checkpoint(directory, sorted(hf_tensors(config).items()), max_shard_bytes=9000)
    (directory / "config.json").write_text(json.dumps(config))
    assert TENSOR in load_file(directory / FILE)
    return directory


def edit(hf: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(hf / FILE)
    tensors[name] = change(tensors[name])
    save_file(tensors, hf / FILE)


def truncated(hf: Path) -> None:
    (hf / FILE).write_bytes((hf / FILE).read_bytes()[:-1])


def appended(hf: Path) -> None:
    (hf / FILE).write_bytes((hf / FILE).read_bytes() + b"0")


def empty(hf: Path) -> None:
    (hf / FILE).write_bytes(b"")


def header_length(hf: Path) -> None:
    (hf / FILE).write_bytes(b"\xff" * 8 + (hf / FILE).read_bytes()[8:])


def header_text(hf: Path) -> None:
    data = bytearray((hf / FILE).read_bytes())
    data[8] = ord("[")
    (hf / FILE).write_bytes(data)


def a_web_page(hf: Path) -> None:
    (hf / FILE).write_text("<html>Access to this model is restricted. You must log in.</html>")


def lfs_pointer(hf: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4943162336\n"
    (hf / FILE).write_text(text)


def missing_shard(hf: Path) -> None:
    (hf / FILE).unlink()


def another_shape(hf: Path) -> None:
    edit(hf, TENSOR, lambda tensor: tensor[:-1].clone())


def missing_tensor(hf: Path) -> None:
    index = json.loads((hf / INDEX_NAME).read_text())
    tensors = load_file(hf / FILE)
    del tensors[TENSOR], index["weight_map"][TENSOR]
    save_file(tensors, hf / FILE)
    (hf / INDEX_NAME).write_text(json.dumps(index))


def index_broken(hf: Path) -> None:
    (hf / INDEX_NAME).write_text("{")


def index_binary(hf: Path) -> None:
    (hf / INDEX_NAME).write_bytes(b"\xff\xfe\x00")


def both(hf: Path) -> None:
    shutil.copy(hf / FILE, hf / "model.safetensors")


def only(name: str) -> Callable[[Path], None]:
    """The weights replaced by a file of that name."""

    def spoil(hf: Path) -> None:
        for path in [*hf.glob("*.safetensors"), hf / INDEX_NAME]:
            path.unlink()
        (hf / name).write_text("{}")

    spoil.__name__ = f"only {name}"
    return spoil


DAMAGES = [
    (truncated, rf"{FILE} is damaged or not complete: \d+ bytes where the header says \d+"),
    (appended, rf"{FILE} is damaged or not complete: \d+ bytes where the header says \d+"),
    (empty, rf"{FILE} is damaged or not complete: 0 bytes do not hold the header"),
    (header_length, rf"{FILE} is damaged or not complete: \d+ bytes do not hold the header"),
    (header_text, rf"{FILE} is damaged or not complete: "),
    (a_web_page, rf"{FILE} is damaged or not complete: \d+ bytes do not hold the header"),
    (lfs_pointer, rf"{FILE} is damaged or not complete: \d+ bytes do not hold the header"),
    (missing_shard, rf"lacks shards \['{FILE}'\] that {INDEX_NAME} names"),
    (another_shape, rf"HF tensor {TENSOR} in \S+{FILE} has shape \[39, 24\], expected \[40, 24\]"),
    (missing_tensor, f"HF checkpoint lacks {TENSOR}"),
    (index_broken, f"{INDEX_NAME} is not an index of safetensors files"),
    (index_binary, f"{INDEX_NAME} is not an index of safetensors files"),
    (both, f"has both model.safetensors and {INDEX_NAME}, which names other files: remove what"),
]
# In their place, which vLLM may know how to load.
OTHERS = [
    (only("pytorch_model.bin"), "nor .*, but pytorch_model.bin: pickled weights are not read"),
    (only("consolidated.00.pth"), "nor .*, but consolidated.00.pth: pickled weights are not read"),
    (only("model.Q4.gguf"), "nor .*, but model.Q4.gguf: quantized weights are not read"),
    (only("weights.safetensors"), "nor .*, but weights.safetensors: must be called model.safeten"),
    (only("adapter_config.json"), r"nor .*, but an adapter \(LoRA\): merge it into its base model"),
    (only("notes.txt"), f"has neither model.safetensors nor {INDEX_NAME}$"),
]


def refusal(check: Callable[[], None]) -> str:
    with pytest.raises(UserError) as refused:
        check()
    text = str(refused.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("spoil", "said"), DAMAGES + OTHERS, ids=[spoil.__name__ for spoil, _ in DAMAGES + OTHERS]
)
def test_what_is_damaged_is_named_at_the_start(
    tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture, spoil: Callable, said: str
) -> None:
    model, config = ModelConfig(path=str(hf)), qwen2_config()
    check_weights(model, config, hf)
    check_weights_for_engine(model, config, hf)
    spoil(hf)
    for_training = refusal(lambda: check_weights(model, config, hf))
    assert for_training.startswith(f"model.path={str(hf)!r}: ") and re.search(said, for_training)
    check_weights(ModelConfig(path=str(hf), init="random"), config, hf)  # reads no weights
    if (spoil, said) in OTHERS:
        if any(path.suffix in (".bin", ".safetensors") for path in hf.iterdir()):
            check_weights_for_engine(model, config, hf)
        else:
            for_engine = refusal(lambda: check_weights_for_engine(model, config, hf))
            assert for_engine.startswith(f"model.path={str(hf)!r}: no weights are there")
    else:
        assert refusal(lambda: check_weights_for_engine(model, config, hf)) == for_training
    assert run(lambda: print(hf_to_megatron(hf, tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("spoil", [both, index_broken, missing_shard])
def test_it_is_a_users_mistake_wherever_it_is_found_first(hf: Path, spoil: Callable) -> None:
    """Also where the tensors' names are read to see which model they are."""
    model = ModelConfig(path=str(hf))
    stored_corrections(qwen2_config(), model, hf)
    spoil(hf)
    said = refusal(lambda: stored_corrections(qwen2_config(), model, hf))
    assert said == refusal(lambda: check_weights(model, qwen2_config(), hf))


@pytest.mark.parametrize("model_type", ["gemma9", "qwen2"])
def test_the_engine_may_know_models_that_no_table_describes(hf: Path, model_type: str) -> None:
    """Their files are looked at, not their tensors' names."""
    config = qwen2_config(model_type=model_type)
    if model_type == "qwen2":
        config["quantization_config"] = {"quant_method": "gptq"}
    missing_tensor(hf)
    model = ModelConfig(path=str(hf))
    check_weights_for_engine(model, config, hf)
    truncated(hf)
    assert "damaged or not complete" in refusal(lambda: check_weights_for_engine(model, config, hf))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_no_numbers(value: float, dtype: torch.dtype) -> None:
    for shape in ((), (1,), (3, 700), (2, 3, 4)):
        tensor = torch.full(shape, -2.5, dtype=dtype)
        check_finite(tensor, "a")
        tensor.view(-1)[-1] = value
        count = tensor.numel()
        with pytest.raises(UserError) as refused:
            check_finite(tensor, "a in b")
        assert str(refused.value) == (
            f"a in b holds NaN or infinity, in 1 of {count} values: the weights are damaged"
        )
    largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    check_finite(largest, "a")  # far from one another, but numbers
    check_finite(torch.empty((0, 3), dtype=dtype), "a")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_they_are_named_while_they_are_read(
    tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture, value: float
) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[30, 7] = value
        return tensor

    edit(hf, TENSOR, spoil)
    source = open_source(hf, read_config(hf), "keep")
    said = f"HF tensor {TENSOR} in {hf / FILE} holds NaN or infinity, in 1 of "
    assert refusal(lambda: source.read(TENSOR)).startswith(f"{said}960 values")
    assert refusal(lambda: source.read(TENSOR, slice(20, 40))).startswith(f"{said}480 values")
    columns = (slice(None), slice(0, 12))
    assert refusal(lambda: source.read(TENSOR, *columns)).startswith(f"{said}480 values")
    assert source.read(TENSOR, slice(0, 20)).shape == (20, 24)  # what a rank does not read
    assert run(lambda: print(hf_to_megatron(hf, tmp_path / "out", progress=False))) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_checkpoint_that_diverged_is_not_exported(
    tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as unchecked:
        unchecked.setattr("megatron_zero.convert.finite.check_finite", lambda tensor, label: None)
        edit(hf, TENSOR, lambda tensor: tensor.fill_(math.nan))
        hf_to_megatron(hf, tmp_path / "megatron", progress=False)
    model = ModelConfig(path=str(tmp_path / "megatron"))
    check_weights(model, qwen2_config(), tmp_path / "megatron")
    said = refusal(lambda: check_weights_for_engine(model, qwen2_config(), tmp_path / "megatron"))
    assert "a Megatron checkpoint, which vLLM does not read: tools/convert/megatron_to_hf" in said
    assert run(lambda: print(megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))) == 2
    error = capsys.readouterr().err
    assert f"HF tensor {TENSOR} in {tmp_path / 'megatron'} holds NaN or infinity" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
    stored = tmp_path / "megatron" / "stage000_0000.distcp"
    stored.write_bytes(stored.read_bytes()[:-1])
    said = refusal(lambda: check_weights(model, qwen2_config(), tmp_path / "megatron"))
    assert "stage000_0000.distcp is damaged or not complete" in said
