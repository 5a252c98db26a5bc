import json
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.observability.rollouts import RolloutRecord, read_rollouts, write_rollouts
from megatron_zero.types import Graded, Prompt, Response, RolloutGroup

RESPONSE = Response(
    token_ids=(7, 8, 1),
    rollout_logprobs=(-0.1, -2.3, -1 / 3),
    text="so \\boxed{5}\n",
    truncated=False,
    policy_version=3,
    engine_index=1,
)
PROMPT = Prompt(index=7, text="2+3?\n", token_ids=(5, 6), answers=("5", "five"), source="s")
GOOD = Graded(reward=1.0, correct=True, formatted=True, outcome="correct")
BAD = Graded(reward=0.0, correct=False, formatted=False, outcome="timeout")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "rollouts" / "step_000010.jsonl.zst"
    group = RolloutGroup(prompt=PROMPT, responses=(RESPONSE, replace(RESPONSE, truncated=True)))
    other = RolloutGroup(prompt=replace(PROMPT, index=8), responses=(RESPONSE,))
    write_rollouts(path, [group, other], [[GOOD, BAD], [BAD]], [[0.5, -0.5], [0.0]])
    assert read_rollouts(path) == [
        RolloutRecord(group=group, graded=(GOOD, BAD), advantages=(0.5, -0.5)),
        RolloutRecord(group=other, graded=(BAD,), advantages=(0.0,)),
    ]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_line_is_a_prompt_and_readable_without_this_program(tmp_path):
    path = tmp_path / "r.zst"
    write_rollouts(path, [RolloutGroup(prompt=PROMPT, responses=(RESPONSE,))], [[GOOD]], [[0.25]])
    line = zstandard.decompress(path.read_bytes()).decode().strip()
    data = json.loads(line)
    assert data["prompt"]["text"] == "2+3?\n"
    assert data["responses"][0]["advantage"] == 0.25
    assert data["responses"][0]["outcome"] == "correct"


@given(
    text=st.text(),
    logprobs=st.lists(st.floats(-1e6, 0), max_size=4),
    advantage=st.floats(allow_nan=False),
)
@settings(deadline=None, max_examples=50)
def test_numbers_and_text_are_exact(text, logprobs, advantage, tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts") / "r.zst"
    tokens = tuple(range(len(logprobs)))
    response = replace(RESPONSE, text=text, token_ids=tokens, rollout_logprobs=tuple(logprobs))
    group = RolloutGroup(prompt=replace(PROMPT, text=text), responses=(response,))
    write_rollouts(path, [group], [[GOOD]], [[advantage]])
    (record,) = read_rollouts(path)
    assert record.group == group and record.advantages == (advantage,)


def test_text_that_is_not_unicode_survives(tmp_path):
    response = replace(RESPONSE, text="half a \ud83d character\u2028")
    group = RolloutGroup(prompt=PROMPT, responses=(response,))
    write_rollouts(tmp_path / "r", [group], [[GOOD]], [[0.0]])
    assert read_rollouts(tmp_path / "r")[0].group == group


def test_lengths_must_agree(tmp_path):
    group = RolloutGroup(prompt=PROMPT, responses=(RESPONSE,))
    with pytest.raises(ValueError):
        write_rollouts(tmp_path / "r", [group], [[GOOD], [GOOD]], [[0.0]])
    with pytest.raises(ValueError):
        write_rollouts(tmp_path / "r", [group], [[GOOD]], [[0.0, 0.0]])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"not compressed",
        zstandard.compress(b"not json"),
        zstandard.compress(b'{"prompt": {}}'),
        zstandard.compress(b"[1]"),
        zstandard.compress(b'{"step": 1}' * 1000)[:30],
    ],
)
def test_other_files_are_refused(data, tmp_path):
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(ValueError, match="not a rollout file"):
        read_rollouts(tmp_path / "r")
