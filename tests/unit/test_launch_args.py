import dataclasses

import pytest

from megatron_zero import launch_args
from megatron_zero.checks import UserError
from megatron_zero.config import ModelConfig, RunConfig
from megatron_zero.launch_args import parse_args

CONFIG = RunConfig(name="a", model=ModelConfig(path="m"))
RECIPES = {"quick": lambda: CONFIG}
LAUNCH_VARIABLES = ("TORCHELASTIC_RUN_ID", *launch_args.JOB_VARIABLES)


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_words_and_options_in_any_order():
    for words in (
        ["quick", "seed=3", "num_steps=5", "--resume", "--run-dir", "out/b"],
        ["--run-dir", "out/b", "quick", "--resume", "seed=3", "num_steps=5"],
        ["quick", "seed=3", "--run-dir=out/b", "num_steps=5", "--resume"],
    ):
        args = parse_args("train", words, recipes=RECIPES)
        assert args.config == dataclasses.replace(
            CONFIG, seed=3, num_steps=5, runs_dir="out", name="b"
        )
        assert args.resume and args.nproc is None


@pytest.mark.parametrize(
    ("given", "runs_dir", "name", "run_dir"),
    [
        ("b", ".", "b", "./b"),
        ("out/b/", "out", "b", "out/b"),
        ("/tmp/x/b", "/tmp/x", "b", "/tmp/x/b"),
    ],
)
def test_run_dir_sets_folder_and_name(given, runs_dir, name, run_dir):
    config = parse_args("train", ["quick", "--run-dir", given], recipes=RECIPES).config
    assert (config.runs_dir, config.name, config.run_dir) == (runs_dir, name, run_dir)


@pytest.mark.parametrize("given", ["/", ".", "out/.hidden"])
def test_run_dirs_without_a_name_are_refused(given):
    with pytest.raises(ValueError, match=r"name=.*plain folder name"):
        parse_args("train", ["quick", "--run-dir", given], recipes=RECIPES)


def test_nproc_is_for_the_launcher():
    assert parse_args("train", ["quick", "--nproc", "3"], launcher=True, recipes=RECIPES).nproc == 3
    with pytest.raises(ValueError, match=r"--nproc=0: must be at least 1"):
        parse_args("train", ["quick", "--nproc", "0"], launcher=True, recipes=RECIPES)
    with pytest.raises(SystemExit):
        parse_args("train", ["quick", "--nproc", "3"], recipes=RECIPES)


def test_an_objective_is_set_before_the_overrides(capsys):
    words = ["quick", "loss.clip_high=0.3", "--objective", "dapo", "reward.overlong_penalty=1"]
    config = parse_args("train", words, recipes=RECIPES).config
    assert config.loss.length_normalizer == "tokens" and config.rollout.max_rounds == 8
    assert config.loss.clip_high == 0.3 and config.reward.overlong_penalty == 1.0
    with pytest.raises(SystemExit):
        parse_args("train", ["quick", "--objective", "dap0"], recipes=RECIPES)
    assert "'drgrpo', 'grpo'" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # pretraining has one objective
        parse_args("pretrain", ["quick", "--objective", "dapo"], recipes=RECIPES)


@pytest.mark.parametrize("words", [[], ["--resume"], ["seed=3", "quick"]])
def test_the_target_comes_first(words):
    with pytest.raises(
        ValueError, match="train: needs a recipe or a YAML file first; recipes: quick"
    ):
        parse_args("train", words, recipes=RECIPES)


def test_options_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args("train", ["quick", "--res"], recipes=RECIPES)
    assert caught.value.code == 2
    assert "unrecognized arguments: --res" in capsys.readouterr().err


def test_under_torchrun(monkeypatch):
    assert not launch_args.is_launched() and launch_args.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # what some schedulers set for a host
    assert not launch_args.is_launched()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # left over
    assert launch_args.node_size() == 1
    for name in launch_args.JOB_VARIABLES:
        monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match=r"RANK=4: must be below WORLD_SIZE=4"):
        launch_args.is_launched()
    monkeypatch.setenv("RANK", "3")
    assert launch_args.is_launched() and launch_args.world_size() == 4
    assert launch_args.node_size() == 2


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK, MASTER_ADDR, MASTER_PORT missing"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR"),
        (dict.fromkeys(launch_args.JOB_VARIABLES, "0") | {"WORLD_SIZE": "many"}, "but WORLD_SIZE"),
        (dict.fromkeys(launch_args.JOB_VARIABLES, "0") | {"MASTER_ADDR": ""}, "but MASTER_ADDR"),
    ],
)
def test_a_part_of_a_jobs_variables_is_refused(given, wrong, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=wrong):
        launch_args.is_launched()


@pytest.mark.parametrize(
    ("visible", "count"), [("0,1,2", 3), ("", 0), ("-1", 0), ("0,-1,2", 1), ("GPU-ab, GPU-cd", 2)]
)
def test_visible_gpus_are_counted(visible, count, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch_args.count_gpus() == count
