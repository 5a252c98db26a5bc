"""Whole checkpoints there and back: bitwise, continued after a kill, refused by name if spoiled."""

import json
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import pytest
import torch
from convert_reference import hf_tensors, qwen2_config, reference_shards
from safetensors.torch import load_file, save_file
from test_convert_families import CONFIGS, source_of

from megatron_zero.convert import (
    first_difference,
    hf_to_megatron,
    megatron_to_hf,
    to_hf,
    to_megatron,
)
from megatron_zero.convert.command_line import run
from megatron_zero.convert.dist_checkpoint import CheckpointReader, Place
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.safetensors_io import INDEX_NAME, SafetensorsSource, write_hf_checkpoint
from megatron_zero.convert.streaming import OutputDirectory, OutputFile
from megatron_zero.convert.verify import VerificationError, verify_conversion

ROOT = Path(__file__).parents[3]
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def write_hf(directory: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
    """A tiny Qwen2 of 53 tokens in several files, with tokenizer and generation settings."""
    config = qwen2_config(**changes)
    tensors = sorted(hf_tensors(config, dtype).items())  # the order in which HF stores them
    write_hf_checkpoint(directory, tensors, max_shard_bytes=9000)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"temperature": 0.7}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


def convert(source: Path, out: Path, layout: tuple[int, int] = (1, 1), **options: object) -> None:
    hf_to_megatron(
        source,
        out,
        tensor_model_parallel_size=layout[0],
        pipeline_model_parallel_size=layout[1],
        progress=False,
        **options,
    )


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage has several files, and large parameters several chunks."""
    monkeypatch.setattr(to_megatron, "MAX_FILE_BYTES", 9000)
    monkeypatch.setattr(to_megatron, "MAX_CHUNK_BYTES", 1000)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_bitwise(
    tmp_path: Path, small_files: None, layout: tuple[int, int], tied: bool
) -> None:
    source = write_hf(tmp_path / "hf", tie_word_embeddings=tied)
    convert(source, tmp_path / "megatron", layout)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert first_difference(source, tmp_path / "back") is None
    expected, found = files(source), files(tmp_path / "back")
    indices = [json.loads(either.pop(INDEX_NAME))["weight_map"] for either in (expected, found)]
    assert indices[0] == indices[1]
    assert found == expected  # the same files, byte by byte


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_there_and_back(tmp_path: Path, name: str, layout: tuple[int, int]) -> None:
    source = source_of(mapping_for(CONFIGS[name]))
    tensors = [(n, source.read(n)) for n in sorted(source.names())]
    write_hf_checkpoint(tmp_path / "hf", tensors, max_shard_bytes=300_000)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIGS[name]))
    experts = 2 if mapping_for(CONFIGS[name]).dims.get("num_experts") else 1
    convert(tmp_path / "hf", tmp_path / "megatron", layout, expert_model_parallel_size=experts)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert first_difference(tmp_path / "hf", tmp_path / "back") is None


def test_prediction_layers_are_dropped_if_told(tmp_path: Path) -> None:
    config = CONFIGS["deepseek_v3_mtp"]
    source = source_of(mapping_for(config))
    tensors = ((n, source.read(n)) for n in source.names())
    write_hf_checkpoint(tmp_path / "hf", tensors)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "megatron", drop_mtp=True)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    back = SafetensorsSource(tmp_path / "back")
    assert {*back.names()} == {*mapping_for(config, with_mtp=False).hf_names()}
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert told == config | {"num_nextn_predict_layers": 0}


def test_8_bit_blocks_become_bf16(tmp_path: Path) -> None:
    config = CONFIGS["deepseek_v3"]
    source = source_of(mapping_for(config))
    tensors, expected = {}, {}
    for name in source.names():
        tensors[name] = expected[name] = source.read(name).bfloat16()
        if name.endswith("down_proj.weight"):
            blocks = [-(-size // 32) for size in tensors[name].shape]
            scale = tensors[name + "_scale_inv"] = 0.5 + torch.rand(blocks)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            grown = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            rows, columns = tensors[name].shape
            expected[name] = (tensors[name].float() * grown[:rows, :columns]).bfloat16()
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    stored = config | {"quantization_config": quantization}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(stored))
    convert(tmp_path / "hf", tmp_path / "megatron", (2, 1))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    back = SafetensorsSource(tmp_path / "back")
    assert {*back.names()} == {*expected}
    assert all(torch.equal(back.read(name), expected[name]) for name in expected)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_the_checkpoint_holds_the_reference_layout(tmp_path: Path, hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    convert(hf, tmp_path / "megatron", (2, 1))
    expected = reference_shards(hf_tensors(config, torch.bfloat16), config, 54, 0, 1)
    reader = CheckpointReader(tmp_path / "megatron")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert torch.equal(
            torch.cat(reader.pieces(Place(name, ()))), expected[name]
        )  # padding rows are zero
    for name in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"):
        key = f"decoder.layers.1.{name}"
        assert torch.equal(torch.cat(reader.pieces(Place(key, ()))), expected[key])
    norm = expected["decoder.layers.1.input_layernorm.weight"]
    fused = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert torch.equal(torch.cat(reader.pieces(Place(fused, ()))), norm)


def test_dtype_is_chosen_and_told(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", dtype=torch.float32, torch_dtype="float32")
    convert(source, tmp_path / "megatron", dtype="bf16")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "kept", progress=False)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "wide", progress=False, dtype="fp32")
    ours = {name: SafetensorsSource(tmp_path / name) for name in ("hf", "kept", "wide")}
    for name in ours["hf"].names():
        rounded = ours["hf"].read(name).to(torch.bfloat16)
        assert torch.equal(ours["kept"].read(name), rounded)
        assert ours["wide"].dtype(name) == torch.float32
        assert torch.equal(ours["wide"].read(name), rounded.float())
    for name, told in (("kept", "bfloat16"), ("wide", "float32")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["torch_dtype"] == told and "dtype" not in config


@pytest.mark.parametrize(("size", "count"), [("100KB", 1), ("4KB", 8), (None, 3)])
def test_files_of_an_export(tmp_path: Path, hf: Path, size: Optional[str], count: int) -> None:
    convert(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size=size, progress=False)
    found = list((tmp_path / "back").glob("*.safetensors"))
    assert first_difference(hf, tmp_path / "back") is None
    assert len(found) == count and (tmp_path / "back" / INDEX_NAME).exists() == (count > 1)


@pytest.mark.parametrize("text", ["0GB", "5 parsecs", "-1GB", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        to_hf.num_bytes(text)
    assert [to_hf.num_bytes(x) for x in ("5GB", "1.5 kib", "7")] == [5 * 10**9, 1536, 7]


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit the tensors of a checkpoint's first file that holds a norm, index included."""
    index = json.loads((directory / INDEX_NAME).read_text())
    file = index["weight_map"]["model.norm.weight"]
    tensors = load_file(directory / file)
    old = set(tensors)
    edit(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})
    for name in old - set(tensors):
        del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(tensors, file)
    (directory / INDEX_NAME).write_text(json.dumps(index))


NORM = "model.norm.weight"
DIFFERENCES = [
    (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
    (lambda t: t.update(new=t[NORM].clone()), "tensor new is only in"),
    (
        lambda t: t.update({NORM: t[NORM].float()}),
        f"{NORM}: dtype torch.bfloat16 and torch.float32",
    ),
    (lambda t: t.update({NORM: t[NORM][:5].clone()}), rf"{NORM}: shape \[24\] and \[5\]"),
    (lambda t: t[NORM].__setitem__(7, 0.5), rf"{NORM} at \[7\]: .* and 0.5"),
]


@pytest.mark.parametrize(("edit", "said"), DIFFERENCES)
def test_the_first_difference_is_named(
    tmp_path: Path, hf: Path, edit: Callable, said: str, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(hf, tmp_path / "other")
    tool = [
        str(ROOT / "tools" / "convert" / "check_roundtrip.py"),
        str(hf),
        str(tmp_path / "other"),
    ]
    assert tool_status(tool) == 0 and "identical" in capsys.readouterr().out
    change(tmp_path / "other", edit)
    assert tool_status(tool) == 1
    assert re.search(said, capsys.readouterr().out)
    (tmp_path / "other" / INDEX_NAME).unlink()
    assert tool_status(tool) == 2 and "error: " in capsys.readouterr().err


def tool_status(words: list[str]) -> int:
    """Run a program of `tools` in this process."""
    before = sys.argv, list(sys.path)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv, sys.path[:] = before
    raise AssertionError("a program ends in sys.exit")


def test_verification_finds_one_flipped_bit(tmp_path: Path, hf: Path) -> None:
    convert(hf, tmp_path / "megatron")
    mapping = to_megatron._mapping(qwen2_config(), 1, 1, 1, with_mtp=True)
    path = tmp_path / "megatron" / "stage000_0000.distcp"
    data = bytearray(path.read_bytes())
    reader = CheckpointReader(tmp_path / "megatron")
    place = Place("decoder.layers.1.mlp.linear_fc2.weight", ())
    at = bytes(data).index(
        torch.cat(reader.pieces(place))[3].contiguous().view(torch.uint8).numpy().tobytes()
    )
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=r"model.layers.1.mlp.down_proj.weight differs"):
        verify_conversion(mapping, tmp_path / "megatron", hf, "keep")


# Bad input, each with what must be said.


def truncated(hf: Path) -> None:
    path = sorted(hf.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


def missing_shard(hf: Path) -> None:
    sorted(hf.glob("*.safetensors"))[1].unlink()


def wrong_dtype(hf: Path) -> None:
    change(hf, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int8)}))


def renamed(hf: Path) -> None:
    change(hf, lambda tensors: tensors.update({"model.nrom.weight": tensors.pop(NORM)}))


def foreign(hf: Path) -> None:
    (hf / "config.json").write_text(json.dumps(qwen2_config(model_type="mamba")))


def nothing(hf: Path) -> None:
    pass


BAD = [
    (truncated, {}, "model-00002-of-.* is damaged or not complete"),
    (missing_shard, {}, "lacks shards .*model-00002-of-"),
    (wrong_dtype, {}, "model.norm.weight in .* is I8"),
    (renamed, {}, "HF checkpoint lacks model.norm.weight"),
    (foreign, {}, "model_type='mamba': must be one of"),
    (nothing, {"tensor_model_parallel_size": 3}, "tensor_model_parallel_size=3: .* one of 1, 2, 4"),
    (nothing, {"pipeline_model_parallel_size": 3}, "pipeline_model_parallel_size=3: .* of 1, 2"),
    (nothing, {"expert_model_parallel_size": 2}, "expert_model_parallel_size=2: .* one of 1"),
    (nothing, {"tensor_model_parallel_size": 0}, "tensor_model_parallel_size=0"),
    (nothing, {"dtype": "fp8"}, "dtype='fp8': must be"),
    (nothing, {"hf": "/no/such/folder"}, "hf='/no/such/folder': no such folder"),
]


@pytest.mark.parametrize(("spoil", "options", "said"), BAD)
def test_bad_input_is_named_and_leaves_nothing(
    tmp_path: Path,
    hf: Path,
    spoil: Callable[[Path], None],
    options: dict,
    said: str,
    capsys: pytest.CaptureFixture,
) -> None:
    spoil(hf)
    arguments = {"hf": hf, "out": tmp_path / "out", "progress": False} | options
    assert run(lambda: print(hf_to_megatron(**arguments))) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


class Harmful:
    def __reduce__(self) -> tuple:
        return os.system, ("echo harm",)


def spoiled_megatron(directory: Path, how: str) -> None:
    stored = directory / "stage000_0000.distcp"
    if how == "truncated":
        stored.write_bytes(stored.read_bytes()[:-1])
    elif how == "overwritten":
        stored.write_bytes(bytes(stored.stat().st_size))
    elif how == "missing":
        stored.unlink()
    elif how == "format":
        (directory / "metadata.json").unlink()
    elif how == "pickle":
        (directory / ".metadata").write_bytes(pickle.dumps(Harmful()))
    elif how == "config":
        (directory / "config.json").unlink()
    elif how == "layers":
        (directory / "config.json").write_text(json.dumps(qwen2_config(num_hidden_layers=1)))
    elif how == "shape":
        (directory / "config.json").write_text(json.dumps(qwen2_config(intermediate_size=20)))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "stage000_0000.distcp is damaged or not complete"),
        ("overwritten", r"stage000_0000.distcp is damaged: no torch.bfloat16 tensor"),
        ("missing", "lacks stage000_0000.distcp"),
        ("format", "is no Megatron distributed checkpoint"),
        ("pickle", "it refers to posix.system"),
        ("config", r"hf_config=None: must be given \(--hf-config\): no config.json in"),
        ("layers", r"has decoder.layers.1.\S+, .*: no rule maps it"),
        ("shape", r"fc1.weight in .* has shape \[80, 24\], expected \[40, 24\]"),
    ],
)
def test_bad_megatron_checkpoints(
    tmp_path: Path, hf: Path, how: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    convert(hf, tmp_path / "megatron")
    spoiled_megatron(tmp_path / "megatron", how)
    assert run(lambda: print(megatron_to_hf(tmp_path / "megatron", tmp_path / "out"))) == 2
    captured = capsys.readouterr()
    assert re.search(said, captured.err) and "harm" not in captured.out
    assert not (tmp_path / "out").exists()


def test_a_run_is_converted_by_its_directory(
    tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture
) -> None:
    """The run, its checkpoints or a step; where that says too little, the choices are listed."""
    run_dir, step = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_000004"
    convert(hf, step)
    (run_dir / "model").mkdir()
    for path in step.glob("*.json"):  # as in a run, config and tokenizer are in its model folder
        if path.name != "metadata.json":
            path.rename(run_dir / "model" / path.name)
    for name in ("step_000005.incomplete", "step_000003.bak", "step_000004_copy"):
        shutil.copytree(step, step.with_name(name))
    for number, given in enumerate((run_dir, run_dir / "checkpoints", step)):
        out = tmp_path / f"out{number}"
        assert run(lambda: print(megatron_to_hf(given, out))) == 0  # noqa: B023
        assert first_difference(hf, out) is None
        assert (out / "tokenizer.json").is_file()
    shutil.copytree(step, step.with_name("step_000010"))
    (tmp_path / "empty").mkdir()
    both = f"{step}, {step.with_name('step_000010')}"
    refused = {
        run_dir: f"holds 2 checkpoints: give one of {both}",
        run_dir / "checkpoints": f"holds 2 checkpoints: give one of {both}",
        hf: "is an HF checkpoint already",
        tmp_path / "none": "no such folder",
        tmp_path / "empty": "holds no Megatron checkpoint: must be a folder with metadata.json and "
        ".metadata, or a run's directory with a checkpoint",
    }
    capsys.readouterr()
    for given, said in refused.items():
        assert run(lambda: print(megatron_to_hf(given, tmp_path / "no"))) == 2  # noqa: B023
        assert capsys.readouterr().err == f"error: megatron={str(given)!r}: {said}\n"


# Interruptions.


@pytest.fixture(params=["to_megatron", "to_hf"])
def conversion(
    request: pytest.FixtureRequest, tmp_path: Path, hf: Path, small_files: None
) -> Callable[..., object]:
    """One direction as a function of `out` and further options."""
    if request.param == "to_megatron":
        return lambda out, **options: convert(hf, out, (2, 2), **options)
    convert(hf, tmp_path / "megatron", (2, 2))
    return lambda out, **options: megatron_to_hf(
        tmp_path / "megatron", out, progress=False, **options
    )


@pytest.mark.parametrize("limit", [1, 7, 20])
def test_an_interrupted_conversion_is_continued(
    tmp_path: Path, conversion: Callable, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    conversion(tmp_path / "whole")
    writes, real = [], OutputFile.write

    def write(self: OutputFile, data: bytes) -> None:
        writes.append((self.path.name, len(data)))
        if len(writes) == limit:
            raise OSError(28, "No space left on device", "disk")
        real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "write", write)
        with pytest.raises(OSError, match="No space left"):
            conversion(tmp_path / "out")
    partial = tmp_path / "out.incomplete"
    assert partial.is_dir() and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="continue it with --resume or remove it"):
        conversion(tmp_path / "out")
    with pytest.raises(ValueError, match="begun with another dtype"):
        conversion(tmp_path / "out", resume=True, dtype="fp32")
    conversion(tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole") and not partial.exists()
    with pytest.raises(ValueError, match="exists already"):
        conversion(tmp_path / "out", resume=True)


def test_what_is_done_is_kept_only_if_it_is_unharmed(
    tmp_path: Path, hf: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(hf, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(to_megatron, "write_metadata", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(hf, tmp_path / "out")
    done = sorted((tmp_path / "out.incomplete").glob("*.distcp"))
    flipped = bytearray(done[1].read_bytes())
    flipped[len(flipped) // 2] ^= 4
    done[1].write_bytes(flipped)
    written, real = [], to_megatron._write

    def write(output: OutputDirectory, name: str, *rest: object) -> object:
        written.append(name)
        return real(output, name, *rest)

    monkeypatch.setattr(to_megatron, "_write", write)
    convert(hf, tmp_path / "out", resume=True)
    assert written == [done[1].name] and len(done) > 3
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_changed_source_is_not_continued(
    tmp_path: Path, hf: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(to_megatron, "write_metadata", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(hf, tmp_path / "out")
    os.utime(hf / "config.json", (1, 1))
    with pytest.raises(ValueError, match="begun with another source"):
        convert(hf, tmp_path / "out", resume=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Optional
sys.path.insert(0, sys.argv[1])
from megatron_zero.convert import hf_to_megatron, megatron_to_hf, to_megatron
from megatron_zero.convert.streaming import OutputFile
to_megatron.MAX_FILE_BYTES, to_megatron.MAX_CHUNK_BYTES = 9000, 1000
real, left = OutputFile.write, [int(sys.argv[5])]
def write(self, data):
    left[0] -= len(data)
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, data)
OutputFile.write = write
globals()[sys.argv[2]](sys.argv[3], sys.argv[4])
"""


@pytest.mark.processes
def test_a_killed_conversion_is_continued(tmp_path: Path, hf: Path, small_files: None) -> None:
    convert(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf_again", progress=False)
    cases = [
        ("hf_to_megatron", hf, "megatron"),
        ("megatron_to_hf", tmp_path / "megatron", "hf_again"),
    ]
    children = []
    for function, source, whole in cases:
        half = sum(map(len, files(tmp_path / whole).values())) // 2
        words = [str(ROOT), function, str(source), str(tmp_path / function), str(half)]
        children.append(subprocess.Popen([sys.executable, "-c", KILLED, *words]))
    for child, (function, source, whole) in zip(children, cases, strict=True):
        assert child.wait(timeout=120) == -signal.SIGKILL
        out = tmp_path / function
        assert not out.exists() and out.with_name(f"{function}.incomplete").is_dir()
        for name in ("metadata.json", ".metadata", "config.json", INDEX_NAME):
            assert not (out.with_name(f"{function}.incomplete") / name).exists()
        {"hf_to_megatron": hf_to_megatron, "megatron_to_hf": megatron_to_hf}[function](
            source, out, resume=True, progress=False
        )
        assert files(out) == files(tmp_path / whole)


def test_a_file_that_may_not_grow(
    tmp_path: Path, conversion: Callable, capsys: pytest.CaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        assert run(lambda: print(conversion(tmp_path / "out"))) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "File too large" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path: Path, conversion: Callable, capsys: pytest.CaptureFixture) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small tmpfs")
    try:
        assert run(lambda: print(conversion(disk / "out"))) == 1
        error = capsys.readouterr().err
        assert "No space left on device" in error and error.count("\n") == 1
        assert [path.name for path in disk.iterdir()] == ["out.incomplete"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
