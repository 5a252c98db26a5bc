"""Every published objective against a literal transcription of its equation, value and gradient.

The literal side is plain loops over responses and tokens in float64, as the papers write the sums,
and uses nothing of the library; the other side is the whole path of a training step: rewards,
advantages, samples, packing, masks, denominators, loss. In float64 they agree to 1e-10, in float32
to 1e-6, however the samples are cut into microbatches and spread over ranks.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from megatron_zero.advantages import (
    advantage_function,
    group_advantages,
    leave_one_out_advantages,
    overlong_penalty,
    training_rewards,
)
from megatron_zero.batching import (
    Packing,
    build_global_batch,
    build_samples,
    step_denominator,
    token_rows,
)
from megatron_zero.config import (
    AdvantageConfig,
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    replace,
)
from megatron_zero.losses import (
    cispo_loss,
    clipped_policy_loss,
    gspo_loss,
    policy_objective,
    reinforce_loss,
    response_means,
    response_sums,
    sequence_mask,
)
from megatron_zero.objective import PRESETS
from megatron_zero.types import Graded, Microbatch, Prompt, Response, RolloutGroup, TrainSample

P, G = 3, 4
LONGEST = 12
BUFFER = 4  # a power of two: its quotients are exact in float32
Terms = list[torch.Tensor]  # what a literal formula adds up, already divided: scalars, float64


@dataclass
class Answer:
    """One response in the literal formulas: [t] lists of float64 scalars."""

    reward: float
    truncated: bool
    new: torch.Tensor
    entropy: torch.Tensor
    old: list[float]
    ref: list[float]
    engine: list[float]

    def __len__(self) -> int:
        return len(self.old)


Groups = list[list[Answer]]


def make_groups(seed: int = 0, *, longest: int = LONGEST) -> Groups:
    """Ragged responses, two of them truncated; the first group has no signal.

    Every number is exact in float32, so that both precisions see the same ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, low: float, high: float) -> torch.Tensor:
        return (low + (high - low) * torch.rand(length, generator=generator)).float().double()

    groups = []
    for p in range(P):
        answers = []
        for i in range(G):
            truncated = (p, i) in ((1, 0), (2, 1)) and longest == LONGEST
            length = longest if truncated else int(1 + draw(1, 0, longest - 0.01))
            old = draw(length, -3, 0)
            shift = float(draw(1, -0.1, 0.1))  # responses drift as a whole, too
            new = (old + shift + draw(length, -0.2, 0.2)).float().double()
            drift = float(draw(1, -0.1, 0.15))
            answers.append(
                Answer(
                    reward=0.0 if truncated else float((i + p) % 2 == 0) if p else 1.0,
                    truncated=truncated,
                    new=new.clone().requires_grad_(),
                    entropy=draw(length, 0, 3).requires_grad_(),
                    old=old.tolist(),
                    ref=(old + draw(length, -0.5, 0.5)).float().tolist(),
                    engine=(old - drift - draw(length, -0.1, 0.1)).float().tolist(),
                )
            )
        groups.append(answers)
    return groups


# the library's side


def make_config(preset: str = "drgrpo", **sections: dict) -> RunConfig:
    config = RunConfig(
        name="test",
        model=ModelConfig(path="unused"),
        data=DataConfig(max_prompt_tokens=8),
        rollout=RolloutConfig(num_prompts_per_step=P, group_size=G, max_response_tokens=LONGEST),
        batch=BatchConfig(global_batch_size=P * G, max_tokens_per_microbatch=40),
    )
    config = PRESETS[preset](config)
    changes = {name: replace(getattr(config, name), **new) for name, new in sections.items()}
    return replace(config, **changes)


def to_library(groups: Groups) -> tuple[list[RolloutGroup], list[list[Graded]]]:
    rollouts, graded = [], []
    for p, answers in enumerate(groups):
        responses = [
            Response(
                token_ids=tuple(range(10, 10 + len(a))),
                rollout_logprobs=tuple(a.engine),
                text="",
                truncated=a.truncated,
                policy_version=0,
            )
            for a in answers
        ]
        prompt = Prompt(index=p, text="q", token_ids=tuple(range(1, 3 + 2 * p)), answers=("1",))
        rollouts.append(RolloutGroup(prompt=prompt, responses=tuple(responses)))
        graded.append(
            [
                Graded(reward=a.reward, correct=a.reward > 0, formatted=True, outcome="wrong")
                for a in answers
            ]
        )
    return rollouts, graded


def make_samples(config: RunConfig, groups: Groups) -> list[TrainSample]:
    rollouts, graded = to_library(groups)
    rewards = training_rewards(rollouts, graded, config.reward, max_length=LONGEST).double()
    # as in the loop, which has these sums from `Policy.kl_to_ref`
    kl = [[math.fsum(a.old) - math.fsum(a.ref) for a in answers] for answers in groups]
    rewards = rewards - config.advantage.kl_reward_coef * torch.tensor(kl, dtype=torch.float64)
    advantages = advantage_function(config.advantage)(rewards)
    return build_samples(rollouts, graded, advantages, mask_truncated=config.loss.mask_truncated)


def in_float64(m: Microbatch, samples: Sequence[TrainSample], normalizer: str) -> Microbatch:
    """The microbatch with the columns that float32 rounds made again from the samples."""
    advantages, weights = m.advantages.double(), m.loss_weights.double()
    lengths = m.cu_seqlens.diff().tolist()
    for i, start, length in zip(m.sample_index, m.cu_seqlens.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        advantages[rows] = samples[i].advantage * (m.advantages[rows] != 0).double()
        if normalizer == "response":
            weights[rows] = m.loss_mask[rows].double() / samples[i].response_length
    return dataclasses.replace(
        m, advantages=advantages, loss_weights=weights, rollout_logprobs=m.rollout_logprobs.double()
    )


def per_token(m: Microbatch, values: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[T] of a microbatch: the values of each sequence's response, 0 elsewhere."""
    rows = []
    for i, length in zip(m.sample_index, m.cu_seqlens.diff().tolist(), strict=False):
        num_response = len(values[i])
        # the responses of these tests start right after the prompt of their group, see to_library
        num_prompt = 1 + 2 * (i // G)
        padding = length - num_prompt - num_response
        rows.append(torch.cat([torch.zeros(num_prompt), values[i], torch.zeros(padding)]).to(dtype))
    return torch.cat(rows)


def library_losses(
    config: RunConfig,
    groups: Groups,
    dtype: torch.dtype,
    layout: tuple[int, int, int] = (1, 40, 1),
    *,
    with_ref: bool = False,
) -> list[tuple[torch.Tensor, list[int]]]:
    """Per optimizer step: the loss, summed over ranks and microbatches, and its samples."""
    dp_size, max_tokens, alignment = layout
    config = replace(config, batch=replace(config.batch, skip_zero_advantage=False))
    samples = make_samples(config, groups)
    answers = [a for group in groups for a in group]
    objective = policy_objective(config.loss)
    losses: list[tuple[torch.Tensor, list[int]]] = []
    for dp_rank in range(dp_size):
        packing = Packing(
            dp_rank=dp_rank, dp_size=dp_size, max_tokens=max_tokens, alignment=alignment
        )
        minibatches = build_global_batch(samples, config, packing, step=0).minibatches
        losses = losses or [(torch.zeros((), dtype=dtype), []) for _ in minibatches]
        for step, minibatch in enumerate(minibatches):
            total, used = losses[step]
            for m in minibatch.microbatches:
                if not m.sample_index:
                    continue
                if dtype == torch.float64:
                    m = in_float64(m, samples, config.loss.length_normalizer)
                columns = {"old_logprobs": [torch.tensor(a.old).double() for a in answers]}
                if with_ref:
                    columns["ref_logprobs"] = [torch.tensor(a.ref).double() for a in answers]
                m = dataclasses.replace(
                    m, **{n: per_token(m, values, dtype) for n, values in columns.items()}
                )
                logprobs = per_token(m, [a.new for a in answers], dtype)[m.loss_mask]
                entropy = per_token(m, [a.entropy for a in answers], dtype)[m.loss_mask]
                loss, _, _ = objective(token_rows(m, logprobs, entropy))
                total = total + loss / minibatch.denominator
                used += m.sample_index
            losses[step] = (total, used)
    return losses


# the literal side: what each paper writes


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def normalized(rewards: Sequence[float]) -> list[float]:
    """(R - mean) / std, of GRPO, DAPO (equation 9), GSPO (equation 6)."""
    deviation = math.sqrt(math.fsum((r - mean(rewards)) ** 2 for r in rewards) / (G - 1))
    return [(r - mean(rewards)) / (deviation + 1e-8) for r in rewards]


def clip(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.clamp(x, low, high)


def literal_dapo(groups: Groups, low: float, high: float) -> Terms:
    """arXiv 2503.14476, equations 8 to 10 and 13; rewards of 0 and 1."""
    tokens = sum(len(a) for answers in groups for a in answers)
    terms = []
    for answers in groups:
        rewards = []
        for a in answers:
            over = ((LONGEST - BUFFER) - len(a)) / BUFFER
            rewards.append(a.reward + 0.5 * (0.0 if len(a) <= LONGEST - BUFFER else over))
        for a, advantage in zip(answers, normalized(rewards), strict=True):
            for t in range(len(a)):
                r = torch.exp(a.new[t] - a.old[t])
                gain = torch.minimum(r * advantage, clip(r, 1 - low, 1 + high) * advantage)
                terms.append(-gain / tokens)
    return terms


def literal_gspo(groups: Groups, low: float, high: float) -> Terms:
    """arXiv 2507.18071, equations 5 to 7; the gradient goes through s_i itself."""
    terms = []
    for answers in groups:
        for a, advantage in zip(answers, normalized([a.reward for a in answers]), strict=True):
            log_s = torch.zeros((), dtype=torch.float64)
            for t in range(len(a)):
                log_s = log_s + (a.new[t] - a.old[t])
            s = torch.exp(log_s / len(a))
            gain = torch.minimum(s * advantage, clip(s, 1 - low, 1 + high) * advantage)
            terms.append(-gain / (P * G))
    return terms


def literal_gspo_token(groups: Groups, low: float, high: float) -> Terms:
    """arXiv 2507.18071, equations 13 and 14."""
    terms = []
    for answers in groups:
        for a, advantage in zip(answers, normalized([a.reward for a in answers]), strict=True):
            s = math.exp(mean([a.new[t].item() - a.old[t] for t in range(len(a))]))
            for t in range(len(a)):
                s_t = s * torch.exp(a.new[t]) / torch.exp(a.new[t]).detach()
                gain = torch.minimum(s_t * advantage, clip(s_t, 1 - low, 1 + high) * advantage)
                terms.append(-gain / len(a) / (P * G))
    return terms


def literal_cispo(groups: Groups, low: float, high: float) -> Terms:
    """arXiv 2506.13585, equations 4 and 5."""
    tokens = sum(len(a) for answers in groups for a in answers)
    terms = []
    for answers in groups:
        for a, advantage in zip(answers, normalized([a.reward for a in answers]), strict=True):
            for t in range(len(a)):
                r = math.exp(a.new[t].item() - a.old[t])
                weight = min(max(r, 1 - low), 1 + high)
                terms.append(-weight * advantage * a.new[t] / tokens)
    return terms


def literal_rloo(groups: Groups) -> Terms:
    """arXiv 2402.14740, RLOO: each response's log-probability, weighted."""
    terms = []
    for answers in groups:
        for i, a in enumerate(answers):
            others = [b.reward for j, b in enumerate(answers) if j != i]
            weight = a.reward - sum(others) / (G - 1)
            for t in range(len(a)):
                terms.append(-weight * a.new[t] / (P * G))
    return terms


def literal_drgrpo(
    groups: Groups, addition: Callable[[Answer, int], torch.Tensor], weight=lambda a, t: 1.0
) -> Terms:
    """Dr. GRPO with a weight on its surrogate and something added to it, token by token."""
    terms = []
    for answers in groups:
        for a in answers:
            advantage = a.reward - mean([b.reward for b in answers])
            for t in range(len(a)):
                r = torch.exp(a.new[t] - a.old[t])
                gain = torch.minimum(r * advantage, clip(r, 0.8, 1.2) * advantage)
                terms.append((-weight(a, t) * gain + addition(a, t)) / (P * G * LONGEST))
    return terms


def literal_kl_reward(groups: Groups, coef: float) -> Terms:
    """RLOO as in its paper: the KL estimate of a response is part of its reward."""
    terms = []
    for answers in groups:
        rewards = []
        for a in answers:
            kl = sum(a.old[t] - a.ref[t] for t in range(len(a)))
            rewards.append(a.reward - coef * kl)
        for i, a in enumerate(answers):
            weight = rewards[i] - sum(r for j, r in enumerate(rewards) if j != i) / (G - 1)
            for t in range(len(a)):
                terms.append(-weight * a.new[t] / (P * G))
    return terms


def nothing(a: Answer, t: int) -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


def difference(a: Answer, t: int) -> torch.Tensor:
    return a.ref[t] - a.new[t]


def log_ratios(a: Answer) -> list[float]:
    """Policy to engine, token by token."""
    return [old - engine for old, engine in zip(a.old, a.engine, strict=True)]


def geometric(a: Answer) -> float:
    return math.exp(mean(log_ratios(a)))


def product(a: Answer) -> float:
    return math.exp(math.fsum(log_ratios(a)))


def kept_if(condition: Callable[[Answer], bool]) -> Callable[[Answer, int], float]:
    return lambda a, t: 1.0 if condition(a) else 0.0


CASES: "dict[str, tuple[RunConfig, Callable[[Groups], Terms], dict]]" = {
    "dapo": (
        make_config("dapo", reward={"overlong_buffer_tokens": BUFFER}),
        lambda g: literal_dapo(g, 0.2, 0.28),
        {},
    ),
    "dapo, tight clip": (
        make_config(
            "dapo",
            reward={"overlong_buffer_tokens": BUFFER},
            loss={"clip_low": 0.03, "clip_high": 0.1},
        ),
        lambda g: literal_dapo(g, 0.03, 0.1),
        {},
    ),
    "gspo": (make_config("gspo"), lambda g: literal_gspo(g, 3e-4, 4e-4), {}),
    "gspo, wide clip": (
        make_config("gspo", loss={"clip_low": 0.05, "clip_high": 0.13}),
        lambda g: literal_gspo(g, 0.05, 0.13),
        {},
    ),
    "gspo-token": (
        make_config("gspo", loss={"clip_low": 0.05, "clip_high": 0.13}),
        lambda g: literal_gspo_token(g, 0.05, 0.13),
        {},
    ),
    "cispo": (make_config("cispo"), lambda g: literal_cispo(g, 1.0, 4.0), {}),
    "cispo, both bounds": (
        make_config("cispo", loss={"clip_low": 0.05, "clip_high": 0.1}),
        lambda g: literal_cispo(g, 0.05, 0.1),
        {},
    ),
    "rloo": (make_config("rloo"), literal_rloo, {}),
    "rloo, KL in the reward": (
        make_config("rloo", advantage={"kl_reward_coef": 0.05}),
        lambda g: literal_kl_reward(g, 0.05),
        {},
    ),
    "entropy bonus": (
        make_config(loss={"entropy_coef": 0.03}),
        lambda g: literal_drgrpo(g, lambda a, t: -0.03 * a.entropy[t]),
        {},
    ),
    "k1": (
        make_config(loss={"kl_coef": 0.04, "kl_kind": "k1"}),
        lambda g: literal_drgrpo(g, lambda a, t: -0.04 * difference(a, t)),
        {"with_ref": True},
    ),
    "k2": (
        make_config(loss={"kl_coef": 0.04, "kl_kind": "k2"}),
        lambda g: literal_drgrpo(g, lambda a, t: 0.04 * difference(a, t) ** 2 / 2),
        {"with_ref": True},
    ),
    "k3": (
        make_config(loss={"kl_coef": 0.04, "kl_kind": "k3"}),
        lambda g: literal_drgrpo(
            g, lambda a, t: 0.04 * (torch.exp(difference(a, t)) - 1 - difference(a, t))
        ),
        {"with_ref": True},
    ),
    "token TIS": (
        make_config(loss={"importance_cap": 1.1}),
        lambda g: literal_drgrpo(
            g, nothing, lambda a, t: min(math.exp(a.old[t] - a.engine[t]), 1.1)
        ),
        {},
    ),
    "sequence TIS": (
        make_config(loss={"importance_cap": 1.5, "importance_level": "sequence"}),
        lambda g: literal_drgrpo(g, nothing, lambda a, t: min(product(a), 1.5)),
        {},
    ),
    "sequence MIS": (
        make_config(
            loss={
                "importance_cap": 1.5,
                "importance_level": "sequence",
                "sequence_mask": "product",
                "sequence_mask_low": 0.0,
                "sequence_mask_high": 1.5,
            }
        ),
        lambda g: literal_drgrpo(g, nothing, lambda a, t: product(a) if product(a) <= 1.5 else 0.0),
        {},
    ),
    "geometric mask": (
        make_config(
            loss={
                "sequence_mask": "geometric",
                "sequence_mask_low": 0.95,
                "sequence_mask_high": 1.15,
            }
        ),
        lambda g: literal_drgrpo(g, nothing, kept_if(lambda a: 0.95 <= geometric(a) <= 1.15)),
        {},
    ),
    "product mask": (
        make_config(
            loss={
                "sequence_mask": "product",
                "sequence_mask_low": 0.85,
                "sequence_mask_high": 2.0,
                "entropy_coef": 0.03,  # a masked response is left out of this term, too
            }
        ),
        lambda g: literal_drgrpo(
            g,
            lambda a, t: -0.03 * a.entropy[t] * kept_if(lambda a: 0.85 <= product(a) <= 2)(a, t),
            kept_if(lambda a: 0.85 <= product(a) <= 2),
        ),
        {},
    ),
    "overlong filter": (
        make_config(loss={"mask_truncated": True}),
        lambda g: literal_drgrpo(g, nothing, kept_if(lambda a: not a.truncated)),
        {},
    ),
    "length 1": (make_config("gspo"), lambda g: literal_gspo(g, 3e-4, 4e-4), {"longest": 1}),
}


def gradients(groups: Groups, name: str) -> list[torch.Tensor]:
    tensors = [getattr(a, name) for answers in groups for a in answers]
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]


def worst_difference(
    ours: torch.Tensor, ours_groups: Groups, literal: Terms, literal_groups: Groups
) -> float:
    """Largest relative difference of the value and of both gradients.

    Terms of both signs cancel in a loss, so its rounding is relative to the sum of their sizes.
    """
    ours.backward()
    total = torch.stack(literal).sum()
    total.backward()
    worst = abs(ours.item() - total.item()) / math.fsum(abs(t.item()) for t in literal)
    for name in ("new", "entropy"):
        theirs = gradients(literal_groups, name)
        scale = max(g.abs().max().item() for g in theirs)
        for a, b in zip(gradients(ours_groups, name), theirs, strict=True):
            difference = (a - b).abs().max().item()
            assert scale > 0 or difference == 0
            worst = max(worst, difference / (scale or 1.0))
    return worst


LAYOUTS = [(1, 1000, 1), (1, 24, 1), (2, 40, 1), (3, 24, 4)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", list(CASES))
def test_the_objective_is_the_published_formula(name, dtype, bound, layout) -> None:
    config, literal, options = CASES[name]
    longest, with_ref = options.get("longest", LONGEST), "with_ref" in options
    ours_groups, literal_groups = make_groups(longest=longest), make_groups(longest=longest)
    ((ours, used),) = library_losses(config, ours_groups, dtype, layout, with_ref=with_ref)
    assert sorted(used) == list(range(P * G))
    assert worst_difference(ours, ours_groups, literal(literal_groups), literal_groups) <= bound


def test_the_cases_differ_and_their_bounds_act() -> None:
    """Were one objective computed for another, the test above could not tell: they must differ."""
    seen: dict[str, torch.Tensor] = {}
    for name, (_, literal, options) in CASES.items():
        if options.get("longest") or name == "gspo-token":
            continue
        groups = make_groups()
        torch.stack(literal(groups)).sum().backward()
        seen[name] = torch.cat(gradients(groups, "new") + gradients(groups, "entropy"))
    names = list(seen)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (seen[a] - seen[b]).abs().max() > 1e-5, (a, b)
    groups = make_groups()
    answers = [a for g in groups for a in g]
    for inside in (
        [0.95 <= geometric(a) <= 1.15 for a in answers],
        [0.85 <= product(a) <= 2 for a in answers],
        [product(a) <= 1.5 for a in answers],
        [0.95 <= math.exp(mean((a.new - torch.tensor(a.old)).tolist())) <= 1.13 for a in answers],
        [a.truncated for a in answers],
    ):
        assert 0 < sum(inside) < len(answers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_token_mean_is_over_each_optimizer_step_and_its_trained_tokens(layout) -> None:
    """Two optimizer steps, truncated responses filtered: DAPO's equation 12 for each of them."""
    config = make_config(
        "dapo",
        reward={"overlong_buffer_tokens": 0},
        loss={"mask_truncated": True},
        batch={"global_batch_size": P * G // 2},
    )
    ours_groups, literal_groups = make_groups(), make_groups()
    steps = library_losses(config, ours_groups, torch.float64, layout)
    assert sorted(i for _, used in steps for i in used) == list(range(P * G))
    terms = []
    for _, used in steps:
        answers = [literal_groups[i // G][i % G] for i in used]
        tokens = sum(len(a) for a in answers if not a.truncated)
        for i, a in zip(used, answers, strict=True):
            advantage = normalized([b.reward for b in literal_groups[i // G]])[i % G]
            for t in range(0 if a.truncated else len(a)):
                r = torch.exp(a.new[t] - a.old[t])
                gain = torch.minimum(r * advantage, clip(r, 0.8, 1.28) * advantage)
                terms.append(-gain / tokens)
    ours = torch.stack([loss for loss, _ in steps]).sum()
    assert worst_difference(ours, ours_groups, terms, literal_groups) <= 1e-10


@pytest.mark.parametrize("name", [n for n in CASES if n != "length 1"])
def test_no_gradient_where_the_loss_mask_is_zero(name) -> None:
    config, _, options = CASES[name]
    config = replace(config, loss=replace(config.loss, mask_truncated=True))
    groups = make_groups()
    samples = make_samples(config, groups)
    answers = [a for group in groups for a in group]
    packing = Packing(dp_rank=0, dp_size=1, max_tokens=1000, alignment=4)
    config = replace(config, batch=replace(config.batch, skip_zero_advantage=False))
    (minibatch,) = build_global_batch(samples, config, packing, step=0).minibatches
    (m,) = minibatch.microbatches
    old, ref = ([torch.tensor(getattr(a, n)) for a in answers] for n in ("old", "ref"))
    m = dataclasses.replace(
        m,
        old_logprobs=per_token(m, old, torch.float32),
        ref_logprobs=per_token(m, ref, torch.float32) if "with_ref" in options else None,
    )
    logprobs = per_token(m, [a.new.detach() for a in answers], torch.float32).requires_grad_()
    entropy = torch.ones_like(logprobs, requires_grad=True)
    rows = token_rows(m, logprobs[m.loss_mask], entropy[m.loss_mask])
    loss, sums, _ = policy_objective(config.loss)(rows)
    loss.backward()
    lengths = [len(answers[i]) * (not samples[i].masked) for i in m.sample_index]
    assert rows.response_lengths.tolist() == lengths and sums["tokens"] == sum(lengths)
    for grad in (logprobs.grad, entropy.grad):
        assert grad is None or not grad[~m.loss_mask].any()
    assert logprobs.grad is not None and logprobs.grad[m.loss_mask].any()
    masked = [i for i in m.sample_index if answers[i].truncated]
    assert masked and all(samples[i].masked for i in masked)


# properties


def rows_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_leave_one_out_is_the_group_mean_scaled() -> None:
    rewards = torch.rand(5, G, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = group_advantages(rewards, normalize_std=False) * G / (G - 1)
    torch.testing.assert_close(leave_one_out_advantages(rewards), scaled, rtol=1e-12, atol=1e-15)
    third = pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert leave_one_out_advantages(torch.tensor([[1.0, 0, 0, 0]]))[0].tolist() == third
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out_advantages(rewards[:, :1])


def loss_and_gradient(function: Callable[..., torch.Tensor], new: torch.Tensor, *arguments, **more):
    leaf = new.clone().requires_grad_()
    loss = function(leaf, *arguments, **more)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def test_gspo_of_one_token_responses_is_the_token_level_surrogate() -> None:
    generator = torch.Generator().manual_seed(1)
    new, old, advantages = torch.randn(3, 50, generator=generator, dtype=torch.float64) * 0.3
    lengths = torch.ones(50, dtype=torch.int64)
    bounds = {"clip_low": 0.2, "clip_high": 0.3}
    token = loss_and_gradient(clipped_policy_loss, new, old, advantages, **bounds)
    mean_log_ratio = response_means(new - old, lengths)
    sequence = loss_and_gradient(gspo_loss, new, mean_log_ratio, advantages, **bounds)
    for a, b in zip(token, sequence, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_clip_higher_with_equal_bounds_is_ppo() -> None:
    generator = torch.Generator().manual_seed(2)
    new, old, advantages = torch.randn(3, 200, generator=generator, dtype=torch.float64) * 0.4
    ours, _ = loss_and_gradient(
        clipped_policy_loss, new, old, advantages, clip_low=0.2, clip_high=0.2
    )
    for value, n, o, a in torch.stack([ours, new, old, advantages]).T.tolist():
        r = math.exp(n - o)
        g = (1 + 0.2) * a if a >= 0 else (1 - 0.2) * a  # PPO's other form of its surrogate
        assert value == pytest.approx(-min(r * a, g), rel=1e-12)
    higher, _ = loss_and_gradient(
        clipped_policy_loss, new, old, advantages, clip_low=0.2, clip_high=0.28
    )
    changed = higher != ours
    assert changed.any() and (advantages[changed] > 0).all()
    assert ((new - old).exp()[changed] > 1.2).all()


def test_cispo_keeps_every_tokens_gradient() -> None:
    new, old = rows_of(0.5, -0.7, 0.05), rows_of(0.0, 0.0, 0.0)
    advantages = rows_of(1.0, -1.0, 2.0)
    ratio = (new - old).exp()
    _, grad = loss_and_gradient(cispo_loss, new, old, advantages, clip_low=0.2, clip_high=0.2)
    assert grad.tolist() == pytest.approx([-1.2, 0.8, -2 * ratio[2].item()], rel=1e-12)
    _, ppo = loss_and_gradient(
        clipped_policy_loss, new, old, advantages, clip_low=0.2, clip_high=0.2
    )
    assert ppo[:2].tolist() == [0.0, 0.0]  # which CISPO keeps
    assert ppo[2].item() == pytest.approx(grad[2].item(), rel=1e-12)  # unclipped: the same
    # on-policy all weights are 1: the policy gradient
    _, grad = loss_and_gradient(cispo_loss, new, new, advantages, clip_low=1.0, clip_high=4.0)
    _, policy_gradient = loss_and_gradient(reinforce_loss, new, advantages)
    assert torch.equal(grad, policy_gradient)


def test_all_surrogates_have_one_gradient_on_policy() -> None:
    """At ratio 1 nothing is clipped: each of them is the policy gradient."""
    new, advantages = rows_of(-0.5, -1.0, -2.0), rows_of(0.5, 0.5, -1.0)
    lengths, bounds = torch.tensor([2, 1]), {"clip_low": 0.2, "clip_high": 0.2}
    for function, arguments in (
        (clipped_policy_loss, (new, advantages)),
        (gspo_loss, (response_means(new - new, lengths), advantages)),
        (cispo_loss, (new, advantages)),
    ):
        _, grad = loss_and_gradient(function, new, *arguments, **bounds)
        assert grad.tolist() == (-advantages).tolist()


def test_sums_over_responses() -> None:
    values = rows_of(1, 2, 4, 8).requires_grad_()
    lengths = torch.tensor([2, 0, 1, 1])  # the second sequence is masked
    assert response_sums(values, lengths).tolist() == [3, 3, 4, 8]
    assert response_means(values, lengths).tolist() == [1.5, 1.5, 4, 8]
    assert not response_sums(values, lengths).requires_grad
    nothing_at_all = response_means(values[:0], torch.tensor([0, 0]))
    assert nothing_at_all.shape == (0,)
    # thousands of float32 terms: added up in float64
    many = torch.full((30_000,), 0.1)
    assert response_sums(many, torch.tensor([30_000]))[0].item() == pytest.approx(3000, rel=1e-7)


def test_sequence_masks_by_hand() -> None:
    log_ratios, lengths = rows_of(0.1, 0.3, 0.5, -0.5), torch.tensor([2, 2])
    mean, total = response_means(log_ratios, lengths), response_sums(log_ratios, lengths)
    first, second = [True, True, False, False], [False, False, True, True]
    low, high = math.exp(-0.1), math.exp(0.19)
    assert sequence_mask(mean, low=low, high=high).tolist() == second
    assert sequence_mask(mean, low=low, high=math.exp(0.21)).all()
    assert sequence_mask(total, low=low, high=math.exp(0.39)).tolist() == second
    assert sequence_mask(total, low=math.exp(0.2), high=math.exp(0.41)).tolist() == first
    assert not sequence_mask(rows_of(1e6, -1e6), low=0.01, high=100.0).any()


def test_a_masked_response_is_counted() -> None:
    config, _, _ = CASES["geometric mask"]
    groups = make_groups()
    answers = [a for group in groups for a in group]
    samples = make_samples(config, groups)
    packing = Packing(dp_rank=0, dp_size=1, max_tokens=1000)
    config = replace(config, batch=replace(config.batch, skip_zero_advantage=False))
    (minibatch,) = build_global_batch(samples, config, packing, step=0).minibatches
    (m,) = minibatch.microbatches
    old = [torch.tensor(a.old) for a in answers]
    m = dataclasses.replace(m, old_logprobs=per_token(m, old, torch.float32))
    new = per_token(m, [a.new for a in answers], torch.float32)[m.loss_mask]
    _, sums, _ = policy_objective(config.loss)(token_rows(m, new, new))
    outside = [a for a in answers if not 0.95 <= geometric(a) <= 1.15]
    assert sums["masked"].item() == sum(map(len, outside)) > 0
    assert minibatch.denominator == P * G * LONGEST


@pytest.mark.parametrize("name", ["dapo, tight clip", "gspo, wide clip", "cispo, both bounds"])
def test_the_clip_fraction_is_the_share_of_bounded_tokens(name) -> None:
    config, _, _ = CASES[name]
    groups = make_groups()
    answers = [a for group in groups for a in group]
    config = replace(config, batch=replace(config.batch, skip_zero_advantage=False))
    samples = make_samples(config, groups)
    packing = Packing(dp_rank=0, dp_size=1, max_tokens=1000)
    (minibatch,) = build_global_batch(samples, config, packing, step=0).minibatches
    (m,) = minibatch.microbatches
    old = [torch.tensor(a.old) for a in answers]
    m = dataclasses.replace(m, old_logprobs=per_token(m, old, torch.float32))
    new = per_token(m, [a.new for a in answers], torch.float32)[m.loss_mask]
    _, sums, _ = policy_objective(config.loss)(token_rows(m, new, new))
    low, high = 1 - config.loss.clip_low, 1 + config.loss.clip_high
    expected = 0
    for i, a in enumerate(answers):
        ratios = (a.new.detach() - torch.tensor(a.old).double()).exp().tolist()
        if config.loss.surrogate == "gspo":
            ratios = [math.exp(mean([math.log(r) for r in ratios]))] * len(a)
        for r in ratios:
            up, down = samples[i].advantage > 0, samples[i].advantage < 0
            if config.loss.surrogate == "cispo":
                up = down = True
            expected += (r > high and up) or (r < low and down)
    assert sums["clipped"].item() == expected > 0


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (20, -1.0), (21, -1.0)]
)
def test_the_overlong_penalty_by_hand(length, penalty) -> None:
    assert overlong_penalty(length, max_length=20, buffer=4) == penalty


def test_the_penalty_reaches_the_rewards_scaled() -> None:
    groups = make_groups()
    reward = RewardConfig(overlong_buffer_tokens=BUFFER, overlong_penalty=0.5)
    rewards = training_rewards(*to_library(groups), reward, max_length=LONGEST)
    for row, answers in zip(rewards.tolist(), groups, strict=True):
        for value, a in zip(row, answers, strict=True):
            assert value == a.reward - 0.5 * max(len(a) - (LONGEST - BUFFER), 0) / BUFFER
    plain = training_rewards(*to_library(groups), RewardConfig(), max_length=LONGEST)
    assert plain.tolist() == [[a.reward for a in answers] for answers in groups]


def test_denominators_by_hand_do_not_depend_on_what_is_skipped() -> None:
    samples = make_samples(make_config(loss={"mask_truncated": True}), make_groups())
    lengths = [s.response_length for s in samples]
    masked = sum(s.response_length for s in samples if s.masked)
    for normalizer, expected in (
        ("constant", P * G * LONGEST),
        ("response", P * G),
        ("tokens", sum(lengths) - masked),
        ("none", P * G),
    ):
        assert expected == step_denominator(
            samples, length_normalizer=normalizer, max_response_tokens=LONGEST
        )
        config = make_config(loss={"length_normalizer": normalizer, "mask_truncated": True})
        packing = Packing(dp_rank=0, dp_size=1, max_tokens=1000)
        (minibatch,) = build_global_batch(samples, config, packing, step=0).minibatches
        assert minibatch.denominator == expected
        used = [i for m in minibatch.microbatches for i in m.sample_index]
        assert len(used) < P * G  # some had advantage 0
    assert masked > 0
    none_left = [dataclasses.replace(s, masked=True) for s in samples]
    tokens = step_denominator(none_left, length_normalizer="tokens", max_response_tokens=LONGEST)
    assert tokens == 1.0


@pytest.mark.parametrize(
    ("loss", "all_needed"), [({}, False), ({"entropy_coef": 0.01}, True), ({"kl_coef": 0.01}, True)]
)
def test_samples_without_advantage_are_only_skipped_where_their_gradient_is_zero(
    loss, all_needed
) -> None:
    config = make_config(loss=loss)
    packing = Packing(dp_rank=0, dp_size=1, max_tokens=1000)
    samples = make_samples(config, make_groups())
    (minibatch,) = build_global_batch(samples, config, packing, step=0).minibatches
    used = [i for m in minibatch.microbatches for i in m.sample_index]
    assert (len(used) == P * G) is all_needed


# settings


def refusal(preset: str = "drgrpo", **sections: dict) -> str:
    with pytest.raises(ValueError) as caught:
        make_config(preset, **sections)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"loss": {"surrogate": "trpo"}}, ["loss.surrogate='trpo'", "ppo, gspo, cispo, reinforce"]),
        ({"loss": {"length_normalizer": "x"}}, ["constant, response, tokens, none"]),
        ({"loss": {"importance_level": "x"}}, ["loss.importance_level='x'", "token, sequence"]),
        ({"loss": {"importance_level": "sequence"}}, ["needs loss.importance_cap above 0"]),
        (
            {"loss": {"surrogate": "gspo", "importance_cap": 2.0}},
            ["loss.importance_level='token'", "must be sequence with loss.surrogate='gspo'"],
        ),
        ({"loss": {"sequence_mask": "x"}}, ["none, geometric, product"]),
        ({"loss": {"sequence_mask_low": 1.0}}, ["loss.sequence_mask_low=1.0", "below 1"]),
        ({"loss": {"sequence_mask_high": 1.0}}, ["loss.sequence_mask_high=1.0", "above 1"]),
        ({"loss": {"clip_low": 1.1}}, ["loss.clip_low=1.1", "at most 1"]),
        ({"loss": {"entropy_coef": -0.1}}, ["loss.entropy_coef=-0.1", "at least 0"]),
        (
            {"loss": {"surrogate": "reinforce"}, "batch": {"global_batch_size": 6}},
            ["loss.surrogate='reinforce'", "batch.global_batch_size=12"],
        ),
        ({"advantage": {"baseline": "x"}}, ["group_mean, leave_one_out"]),
        (
            {"advantage": {"baseline": "leave_one_out", "normalize_std": True}},
            ["advantage.normalize_std=True", "leave_one_out"],
        ),
        (
            {"reward": {"overlong_buffer_tokens": 13}},
            ["reward.overlong_buffer_tokens=13", "rollout.max_response_tokens=12"],
        ),
        ({"reward": {"overlong_penalty": -1.0}}, ["reward.overlong_penalty=-1.0"]),
        ({"rollout": {"max_rounds": 0}}, ["rollout.max_rounds=0", "at least 1"]),
        *(
            (
                {"advantage": advantage, "rollout": {"group_size": 1}},
                ["rollout.group_size=1: must be at least 2", f"advantage.baseline={baseline!r}"],
            )
            for advantage, baseline in (
                ({}, "group_mean"),  # Dr. GRPO
                ({"normalize_std": True}, "group_mean"),  # GRPO
                ({"baseline": "leave_one_out"}, "leave_one_out"),  # RLOO
            )
        ),
    ],
)
def test_refused_combinations_name_the_setting_and_what_is_valid(sections, parts) -> None:
    if sections.get("rollout", {}).get("group_size") == 1:
        sections = sections | {"batch": {"global_batch_size": P}}
    message = refusal(**sections)
    for part in parts:
        assert part in message


def test_gspo_takes_a_sequence_level_correction() -> None:
    loss = {"importance_cap": 2.0, "importance_level": "sequence"}
    assert make_config("gspo", loss=loss).loss.importance_level == "sequence"
    start = make_config(loss={"importance_cap": 2.0})
    assert PRESETS["gspo"](start).loss.importance_level == "sequence"


def test_unused_defaults_change_nothing() -> None:
    """The objectives of before: what a default adds has no effect."""
    assert LossConfig().surrogate == "ppo" and LossConfig().sequence_mask == "none"
    assert AdvantageConfig().baseline == "group_mean"
    assert RolloutConfig().max_rounds == 1 and RewardConfig().overlong_buffer_tokens == 0
