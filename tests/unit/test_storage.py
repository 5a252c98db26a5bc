"""megatron_zero.storage: which settings name files, and where they must be."""

import pytest

from megatron_zero.config_io import apply_overrides, flatten
from megatron_zero.storage import check_on_storage, is_path, is_under, on_storage, path_settings
from recipes import RECIPES

# Settings that are text and name no file.
WORDS = {"name", "logging.wandb_project", "parallel.recompute", "documents.text_key"}
WORDS |= {f"model.{name}" for name in ("init", "dtype")}
WORDS |= {f"data.{name}" for name in ("split", "prompt_key", "answer_key", "template")}
WORDS |= {"reward.answer_format", "advantage.baseline"}
WORDS_OF = ("loss.", "optimizer.")


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_base"])
def test_every_text_setting_is_a_path_or_known_not_to_be(recipe: str) -> None:
    """A new setting that names a file must be added to `path_settings`."""
    config = RECIPES[recipe]()
    texts = {path for path, value in flatten(config).items() if isinstance(value, str | list)}
    paths = {path for path in texts - WORDS if not path.startswith(WORDS_OF)}
    moved = apply_overrides(config, [f"{path}=/x/{path}" for path in sorted(paths)])
    assert path_settings(moved) == {path: [f"/x/{path}"] for path in paths}
    assert {"runs_dir", "model.path", "model.tokenizer"} < paths


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("", False),
        ("Qwen/Qwen2.5-1.5B", False),
        ("gpt2", False),
        ("all@open-r1/DAPO-Math-17k-Processed", False),
        ("math_12k", False),
        ("arithmetic", False),
        ("/models/qwen", True),
        ("./qwen", True),
        ("~/qwen", True),
        ("runs/quickstart_base/hf/step_000500", True),
        ("problems.parquet", True),
        ("here", True),  # a folder of this machine
    ],
)
def test_what_a_path_is(tmp_path, monkeypatch, name: str, answer: bool) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "math_12k").mkdir()  # the known name is meant all the same
    assert is_path(name) is answer


def test_relative_paths_move_and_others_stay() -> None:
    config = apply_overrides(
        RECIPES["quickstart"](),
        ["data.data_dir=/old/sets", "evaluation.datasets=math500,a/b/c.parquet,/old/d.jsonl"],
    )
    assert on_storage(config, "/lab") == {
        "runs_dir": "/lab/runs",
        "model.path": "/lab/runs/quickstart_base/hf/step_000500",
        "evaluation.datasets": "math500,/lab/a/b/c.parquet,/old/d.jsonl",
    }
    moved = apply_overrides(config, [f"{k}={v}" for k, v in on_storage(config, "/lab").items()])
    assert on_storage(moved, "/lab") == {}
    check_on_storage(moved, written=["/lab"], read=["/lab", "/old"])
    with pytest.raises(ValueError, match=r"data\.data_dir='/old/sets': must be on storage"):
        check_on_storage(moved, written=["/lab", "/old"], read=["/lab"])
    with pytest.raises(ValueError, match=r"runs_dir='/lab/runs': must be .* \(none is mounted\)"):
        check_on_storage(moved, written=[], read=["/lab", "/old"])


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/lab", True),
        ("/lab/", True),
        ("/lab/a/../b", True),
        ("/lab/..", False),
        ("/labs", False),
        ("lab", False),
        ("~/lab", False),
        ("/", False),
    ],
)
def test_what_lies_under_a_folder(path: str, answer: bool) -> None:
    assert is_under(path, "/lab") is answer
    assert is_under(path, "/lab/") is answer
