"""Mistakes in files are found by the launcher: one line, status 2, and no process started."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_zero import cli, config_io, launch_args
from megatron_zero.config import ModelConfig, PretrainConfig, RunConfig
from megatron_zero.convert.families import FAMILIES
from megatron_zero.hf_config import MODEL_TYPES

SIZES = {
    "model_type": "qwen2",
    "hidden_size": 64,  # heads of 32: the smallest that vLLM has on a CPU
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}
TOKENIZER = {"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": []}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    """Here: a model, a data set, documents, and the configurations of two runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("TORCHELASTIC_RUN_ID", *launch_args.JOB_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(SIZES))
    Path("model/tokenizer.json").write_text(json.dumps(TOKENIZER))
    save_file({"w": torch.zeros(4)}, "model/model.safetensors", metadata={"format": "pt"})
    Path("data.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    model = ModelConfig(path="model")
    config_io.save_config(RunConfig(name="run", model=model), "run.yaml")
    config_io.save_config(PretrainConfig(name="base", model=model), "base.yaml")
    return tmp_path


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda path, argv, env: commands.append(argv))
    return commands


def test_files_that_are_right_start_the_run(started):
    cli.main(["train", "run.yaml", "data.dataset=data.jsonl", "evaluation.datasets=data.jsonl"])
    Path("model/model.safetensors").unlink()
    cli.main(["train", "run.yaml", "model.init=random"])
    os.rename("model/tokenizer.json", "elsewhere.json")
    cli.main(["pretrain", "base.yaml", "model.init=random", "model.tokenizer=characters"])
    assert len(started) == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.dataset=none.jsonl"], "data.dataset='none.jsonl': no such file"),
        (["data.dataset=data.jsonl", "data.prompt_key=q"], "data.prompt_key='q': no such column"),
        (["data.dataset=data.jsonl", "data.answer_key=a"], "data.answer_key='a': no such column"),
        (["data.data_dir=none", "data.dataset=aime"], "data.data_dir='none': no such folder"),
        (["evaluation.datasets=mathh"], "evaluation.datasets='mathh': must be one of"),
        (["data.template=few_shot", "data.few_shot=no.jsonl"], "data.few_shot='no.jsonl': no such"),
        (["model.tokenizer=./none"], "model.tokenizer='./none': no such folder"),
        (["model.tokenizer=."], "model.tokenizer='.': no tokenizer is there"),
        (["model.path=./none"], "model.path='./none': no such folder"),
        (["--run-dir", "data.jsonl"], "run directory ./data.jsonl: is a file"),
    ],
)
def test_a_setting_that_names_nothing(words, sentence, started, capsys):
    refused(capsys, started, sentence, "train", "run.yaml", *words)


def test_documents_that_are_not_there(started, capsys):
    sentence = "documents.source='none.txt': must be"
    refused(capsys, started, sentence, "pretrain", "base.yaml", "documents.source=none.txt")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def shards(path: Path) -> None:
    path.unlink()
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("file", "damage", "sentence"),
    [
        ("config.json", lambda p: p.write_text("{"), "config.json cannot be read"),
        (
            "config.json",
            lambda p: p.write_text(json.dumps(SIZES | {"model_type": "gpt_neox"})),
            "model.path='model': is a gpt_neox; must be one of deepseek_v2,",
        ),
        ("tokenizer.json", Path.unlink, "no tokenizer is there"),
        ("tokenizer.json", lambda p: p.write_text("{"), "tokenizer.json cannot be read"),
        ("tokenizer.json", lambda p: p.write_text("{}"), "tokenizer.json is no tokenizer"),
        ("model.safetensors", Path.unlink, "holds no weights"),
        (
            "model.safetensors",
            lambda p: p.rename(p.with_name("pytorch_model.bin")),
            "no converted checkpoint, but pytorch_model.bin: pickled weights are not read: load",
        ),
        ("model.safetensors", shards, "lacks model-00001-of-00001.safetensors"),
        ("model.safetensors", truncate, "is damaged or not complete"),
        ("model.safetensors", lambda p: p.write_bytes(b"\0" * 64), "model.safetensors is damaged"),
        ("model.safetensors", lambda p: p.write_bytes(b""), "model.safetensors is damaged"),
        ("model.safetensors", lambda p: p.write_bytes(b"<html>" * 9), "model.safetensors is dam"),
    ],
)
def test_a_damaged_model(file, damage, sentence, started, capsys):
    damage(Path("model", file))
    error = refused(capsys, started, sentence, "train", "run.yaml")
    assert error.startswith("error: model.path='model': ")


def refused(capsys, started, sentence: str, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert not started and not Path("runs").exists()
    return error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--benchmarks", "mathh"], "evaluation.datasets='mathh': must be one of"),
        (["--few-shot", "no.jsonl"], "data.few_shot='no.jsonl': no such file"),
        (["--data-dir", "none", "--benchmarks", "aime"], "data.data_dir='none': no such folder"),
        (["model.tokenizer=."], "model.tokenizer='.': no tokenizer is there"),
    ],
)
def test_mistakes_of_an_evaluation(words, sentence, started, capsys):
    refused(
        capsys,
        started,
        sentence,
        "eval",
        "model",
        "--out",
        "out",
        "--benchmarks=arithmetic",
        *words,
    )
    assert not Path("out").exists()


def test_an_evaluation_takes_models_of_any_family(started, capsys, monkeypatch):
    Path("model/config.json").write_text(json.dumps(SIZES | {"model_type": "gpt_neox"}))

    class Started(Exception):
        pass

    def execve(*args: object) -> None:
        raise Started

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", "model", "--out", "out", "--benchmarks=arithmetic"])
    assert caught.value.code == 1  # of the exception: everything was right
    assert "Started" in capsys.readouterr().err


def test_the_first_process_of_a_machine_checks_under_plain_torchrun(monkeypatch, capsys):
    ran = []

    def rank(local_rank: str) -> None:
        for name in launch_args.JOB_VARIABLES:
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", local_rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        words = ["run.yaml", "data.dataset=none.jsonl"]
        launch_args.run_rank("train", words, lambda config, resume: ran.append(local_rank))

    with pytest.raises(SystemExit) as caught:
        rank("0")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: data.dataset='none.jsonl': no such file")
    rank("1")  # goes on, until torchrun ends it
    monkeypatch.setenv("MEGATRON_ZERO_CHECKED", "1")
    rank("0")  # the launcher has looked
    assert ran == ["1", "0"]


def test_the_first_process_of_all_makes_the_run_directory(monkeypatch, capsys):
    """Before torch, Megatron and the model are loaded; none is left where a file is wrong."""
    for name in launch_args.JOB_VARIABLES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    ran = []

    def rank(number: str, *words: str) -> None:
        monkeypatch.setenv("RANK", number)
        argv = ["run.yaml", "data.dataset=data.jsonl", "evaluation.datasets=", *words]
        launch_args.run_rank("train", argv, lambda config, resume: ran.append(number))

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            rank("0", *words)
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "data.dataset" in refused("data.dataset=none.jsonl")
    rank("1")  # the first of another machine
    assert not Path("runs").exists()
    rank("0")
    assert Path("runs/run/config.yaml").is_file()
    Path("runs/run/metrics.jsonl").write_text("{}\n")
    Path("file").touch()
    assert refused().startswith("error: run directory runs/run: holds the results of a run")
    assert refused("runs_dir=file").startswith("error: run directory file/run: cannot be made")
    rank("0", "--resume")
    assert ran == ["1", "0", "0"]


def test_the_families_known_without_torch_are_those_that_have_a_table():
    assert sorted(MODEL_TYPES) == sorted(FAMILIES)
