"""Engine and policy are one distribution, for every family: `train` with the real engine, float32.

The mismatch of each of two steps, the second after weights that have moved far, is printed as a
table at the end of the tests (tests/conftest.py).
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_zero.data.arithmetic import build_character_tokenizer
from megatron_zero.observability.sinks import read_metrics
from tests import families
from tests.launch import REPOSITORY, torchrun

WORKER = REPOSITORY / "tests" / "distributed" / "mismatch_worker.py"
ALL = [*families.FAMILIES, *families.STRETCHED]
SHARED_ENGINE = ["tp2-sp-ep2-deepseek_v3"]  # two ranks that share one engine
# (processes, TP of the engine) -> cases, one after the other in one launch
LAUNCHES = {(1, 1): ALL, (2, 2): SHARED_ENGINE}
CASES = [(engine_tp, case) for (_, engine_tp), cases in LAUNCHES.items() for case in cases]
MAX_KL = 1e-10

# What the engine has on a CPU: heads of 64, and latent attention of DeepSeek's own size.
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "deepseek_v2": _LATENT,
    "deepseek_v2_lite": _LATENT,
    "deepseek_v3": _LATENT,
}
# Weights so large that wrong ones cannot hide, and the character tokenizer's special tokens.
MODEL = {"initializer_range": 0.08, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of all cases are."""
    directory = tmp_path_factory.mktemp("mismatch")
    for name in ALL:
        families.write(name, directory / name, **MODEL, **SIZES.get(name, {}))
        build_character_tokenizer().save_pretrained(directory / name)
    for (nproc, engine_tp), cases in LAUNCHES.items():
        torchrun(nproc, WORKER, directory, engine_tp, *cases)
    return directory / "runs"


@pytest.mark.parametrize(("engine_tp", "case"), CASES, ids=[c[-1] for c in CASES])
def test_mismatch_of_two_steps(runs: Path, record_property: Any, engine_tp: int, case: str) -> None:
    first, second = read_metrics(runs / case / "metrics.jsonl")
    kls = [step["mismatch/kl"] for step in (first, second)]
    record_property("mismatch_case", f"{case}, engine TP {engine_tp}")
    record_property("mismatch_kls", kls)
    record_property("mismatch_max_abs", max(s["mismatch/max_abs"] for s in (first, second)))
    assert first["policy/grad_norm"] > 0.01  # it has learned: the second sync brought other weights
    assert abs(first["policy/entropy"] - second["policy/entropy"]) > 1e-3
    assert min(kls) > 0 and max(kls) <= MAX_KL
