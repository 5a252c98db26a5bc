"""The `math_smoke` recipe on real problems and the real Qwen2.5 vocabulary, in several layouts."""

from pathlib import Path

import pytest

from megatron_zero.observability.rollouts import read_rollouts
from megatron_zero.observability.sinks import read_metrics
from tests.launch import REPOSITORY, torchrun

WORKER = REPOSITORY / "tests" / "distributed" / "pseudo_reward_worker.py"
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
LAYOUTS = {  # processes, settings
    "dp2": (2, []),
    "tp2 dp2": (4, [f"{TP}=2"]),
    "tp2 pp2": (4, [f"{TP}=2", f"{PP}=2"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shared_dir: Path, qwen_tokenizer_dir: Path) -> dict[str, Path]:
    """Run directories of three steps each."""
    directories = {}
    for name, (nproc, settings) in LAYOUTS.items():
        directory = tmp_path_factory.mktemp("math_smoke") / name.replace(" ", "_")
        torchrun(
            nproc,
            WORKER,
            "math_smoke",
            f"data.data_dir={shared_dir / 'data'}",
            f"model.tokenizer={qwen_tokenizer_dir}",
            "logging.rollouts_every_num_steps=1",
            "checkpoint.save_hf=false",
            "data.max_prompts=64",
            *settings,
            "--run-dir",
            directory,
            timeout_s=400,
        )
        directories[name] = directory
    return directories


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_layouts_agree(runs: dict[str, Path], layout: str) -> None:
    reference, other = (read_metrics(runs[n] / "metrics.jsonl") for n in ("dp2", layout))
    assert [r["step"] for r in reference] == [1, 2, 3] == [r["step"] for r in other]
    assert reference[0]["policy/grad_norm"] > 1e-3 and abs(reference[0]["policy/loss"]) > 1e-3
    for a, b in zip(reference, other, strict=True):
        for name in ("policy/loss", "policy/grad_norm", "policy/entropy", "reward/mean"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7), (a["step"], name)
        assert b["mismatch/max_abs"] <= 1e-4 and b["mismatch/kl"] <= 1e-8


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_layouts_draw_the_same_responses(runs: dict[str, Path], layout: str) -> None:
    for step in (1, 2, 3):
        file = f"rollouts/step_{step:06d}.jsonl.zst"
        reference, other = (read_rollouts(runs[n] / file) for n in ("dp2", layout))
        for a, b in zip(reference, other, strict=True):
            assert a.group.prompt == b.group.prompt
            for x, y in zip(a.group.responses, b.group.responses, strict=True):
                assert x.token_ids == y.token_ids
                assert x.rollout_logprobs == pytest.approx(y.rollout_logprobs, rel=1e-5)


def test_the_prompts_are_the_real_ones(runs: dict[str, Path]) -> None:
    (first, *_) = read_rollouts(runs["dp2"] / "rollouts/step_000001.jsonl.zst")
    assert first.group.prompt.text.startswith("<|im_start|>system\nPlease reason step by step")
    assert first.group.prompt.source == "math_lvl3to5_8k" and len(first.group.responses) == 4
