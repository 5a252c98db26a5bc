"""Real vLLM beside the real policy in the same ranks: one distribution, after every sync."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_zero.layout import CPU_HEAD_DIMS, CPU_LATENT_SIZES
from tests.distributed.engine_worker import LAYOUTS, STOP_IDS
from tests.launch import REPOSITORY, torchrun
from tests.tiny import MAX_RESPONSE

WORKER = REPOSITORY / "tests" / "distributed" / "engine_worker.py"
ENGINES = {1: ["tied"], 2: ["yarn"]}  # engine TP -> options


@pytest.fixture(scope="module", params=list(ENGINES))
def results(request: pytest.FixtureRequest, tmp_path_factory) -> dict[str, Any]:
    out: Path = tmp_path_factory.mktemp("engine") / "results.json"
    # what a job that was killed leaves behind must not stop the next one
    stale = [Path("/dev/shm") / f"-tp:0-[0-1]-cpushm_{rank}" for rank in range(2)]
    for path in stale:
        path.touch()
    torchrun(2, WORKER, request.param, out, *ENGINES[request.param])
    for path in stale:
        path.unlink()
    return json.loads(out.read_text())


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_engine_and_policy_agree_after_every_sync(results, layout: str) -> None:
    for sampled in results[layout]:
        assert sampled["max_abs"] <= 1e-5
        assert 0 <= sampled["kl"] <= 1e-9
    assert results[f"{layout} stale"] > 1e-6  # the engine has a copy, not the policy's memory


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_first_sync_is_verified_token_by_token(results, layout: str) -> None:
    """In every layout; an engine on the weights of before one small update is found out."""
    agreement, disagreement = results[f"{layout} first"]
    assert re.match(r"engine and policy agree on \d+ tokens: KL .*e-1\d, ", agreement)
    kl = re.search(r"disagree after the first weight sync: KL.* is (\S+) on", disagreement)
    assert kl is not None and float(kl[1]) > 1e-6
    assert re.search(r"at token \d+ of \d+ of the response to prompt \d of ", disagreement)


def test_the_same_weights_give_the_same_responses_in_every_layout(results) -> None:
    """Seeds belong to responses: neither the layout nor the number of engines shows."""
    first = results["dp2"][0]["tokens"]
    assert len(first) == 32 and len({tuple(t) for t in first}) > 16
    for layout in LAYOUTS:
        assert results[layout][0]["tokens"] == first
        assert results[layout][1]["tokens"] != first  # the second push brought other weights


def test_every_stop_token_of_the_model_ends_a_response(results) -> None:
    """Those of generation_config.json beside the tokenizer's EOS; the end is part of it."""
    sampled = [mode for layout in LAYOUTS for mode in results[layout]]
    ends = set()
    for mode in sampled:
        for tokens, truncated in zip(mode["tokens"], mode["truncated"], strict=True):
            assert not set(STOP_IDS) & set(tokens[:-1])
            assert truncated == (tokens[-1] not in STOP_IDS)
            assert not truncated or len(tokens) == MAX_RESPONSE
            ends.add(tokens[-1])
    assert len(ends & set(STOP_IDS[1:])) >= 3


def test_the_sizes_that_are_refused_are_those_that_the_kernels_lack(results) -> None:
    assert tuple(results["head_dims"]) == CPU_HEAD_DIMS
    assert results["latent sizes"] == [list(CPU_LATENT_SIZES.values())]


def test_nothing_is_generated_without_weights_or_under_another_version(results) -> None:
    assert "no weights" in results["before the first push"]
    assert "version 1 where version 0 was wanted" in results["tp2 wrong version"]


def test_an_incomplete_or_repeated_push_fails_and_leaves_no_version(results) -> None:
    assert "9 tensors missing, first model.layers.0.input_layernorm" in results["incomplete"]
    assert "came twice" in results["repeated"]
    assert results["incomplete version"] is None and results["repeated version"] is None
