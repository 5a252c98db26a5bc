"""The resolved objective as a formula with its numbers, and the presets that name it.

Every published objective here is a few settings of the same sections: which baseline, which
surrogate, what a response's sum is divided by. A run that says `drgrpo` in its name can still have
any of them set differently, so the program prints what it is about to optimise, not what it is
called. `docs/objectives.md` has the presets in one table.

Standard library only: a launcher prints the same text.
"""

from collections.abc import Callable
from typing import Any

from megatron_zero.config import RunConfig, replace

STD_EPS = "1e-8"  # as in advantages.STD_EPS, which needs torch to be read


def drgrpo(config: RunConfig) -> RunConfig:
    """Dr. GRPO (arXiv 2503.20783): neither the group's deviation nor the length divides."""
    return _ppo(config, normalize_std=False, length_normalizer="constant")


def grpo(config: RunConfig) -> RunConfig:
    """GRPO (arXiv 2402.03300): both divide."""
    return _ppo(config, normalize_std=True, length_normalizer="response")


def length_bias_only(config: RunConfig) -> RunConfig:
    """Ablation: each response is divided by its length, as in GRPO; the advantage is Dr. GRPO's."""
    return _ppo(config, normalize_std=False, length_normalizer="response")


def std_bias_only(config: RunConfig) -> RunConfig:
    """Ablation: advantages are divided by the group's deviation, as in GRPO; lengths are not."""
    return _ppo(config, normalize_std=True, length_normalizer="constant")


def dapo(config: RunConfig) -> RunConfig:
    """DAPO (arXiv 2503.14476): clip-higher, token mean, dynamic sampling, overlong punishment.

    The buffer is the paper's share of the longest response, 4,096 of 20,480 tokens. Rewards are 0
    and 1 here and -1 and 1 there, so half its penalty is the same objective. The paper draws until
    every group has a signal; a run here stops after 8 rounds.
    """
    buffer = config.rollout.max_response_tokens // 5
    return _with(
        _ppo(config, normalize_std=True, length_normalizer="tokens"),
        loss={"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0},
        advantage={"kl_reward_coef": 0.0},
        reward={"overlong_buffer_tokens": buffer, "overlong_penalty": 0.5},
        rollout={"max_rounds": 8},
    )


def gspo(config: RunConfig) -> RunConfig:
    """GSPO (arXiv 2507.18071): GRPO with one ratio per response, and its section 5.1's bounds."""
    loss: dict[str, Any] = {"surrogate": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
    if config.loss.importance_cap > 0:
        loss["importance_level"] = "sequence"
    return _with(config, loss=loss | {"length_normalizer": "response"}, advantage=_GROUP_STD)


def cispo(config: RunConfig) -> RunConfig:
    """CISPO (arXiv 2506.13585): clipped importance weights, no lower bound, token mean.

    MiniMax-M1 does not publish its upper bound; a weight of at most 5 is of the size that later
    work with this objective uses.
    """
    loss = {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "length_normalizer": "tokens"}
    return _with(config, loss=loss, advantage=_GROUP_STD)


def rloo(config: RunConfig) -> RunConfig:
    """RLOO (arXiv 2402.14740): REINFORCE with a leave-one-out baseline; one optimizer step."""
    return _with(
        config,
        loss={"surrogate": "reinforce", "length_normalizer": "none"},
        advantage={"baseline": "leave_one_out", "normalize_std": False},
        batch={"global_batch_size": config.responses_per_step},
    )


_TITLES: "dict[Callable[[RunConfig], RunConfig], str]" = {
    drgrpo: "Dr. GRPO",
    grpo: "GRPO",
    length_bias_only: "GRPO without its standard deviation (length bias only)",
    std_bias_only: "GRPO with a constant length (difficulty bias only)",
    dapo: "DAPO",
    gspo: "GSPO",
    cispo: "CISPO",
    rloo: "RLOO",
}
PRESETS = {preset.__name__: preset for preset in _TITLES}

_SURROGATES = {
    "ppo": "clipped surrogate",
    "gspo": "GSPO's surrogate",
    "cispo": "CISPO's surrogate",
    "reinforce": "REINFORCE",
}

_GROUP_STD = {"baseline": "group_mean", "normalize_std": True}


def _ppo(config: RunConfig, *, normalize_std: bool, length_normalizer: str) -> RunConfig:
    loss: dict[str, Any] = {"surrogate": "ppo", "length_normalizer": length_normalizer}
    if config.loss.surrogate != "ppo":  # whose bounds are on another scale
        loss |= {"clip_low": 0.2, "clip_high": 0.2}
    advantage = {"baseline": "group_mean", "normalize_std": normalize_std}
    return _with(config, loss=loss, advantage=advantage)


def _with(config: RunConfig, **sections: "dict[str, Any]") -> RunConfig:
    """`config` with some settings of some sections, changed together before anything is checked."""
    changed = {name: replace(getattr(config, name), **new) for name, new in sections.items()}
    return replace(config, **changed)


def preset_title(config: RunConfig) -> str:
    """The name of the preset that would change nothing, or what its parts are called."""
    for preset, title in _TITLES.items():
        try:
            if preset(config) == config:
                return title
        except ValueError:  # a preset that this run cannot have is not what it is called
            continue
    return f"{_SURROGATES[config.loss.surrogate]} with settings of its own"


def describe_objective(config: RunConfig) -> str:
    """Several lines: the objective of one optimizer step, every number from `config`.

    Indices: i over responses, t over response tokens. `logp` are log-probabilities at the sampling
    temperature: `old` the policy's before the rollout's first update, `ref` the frozen reference
    policy's, `rollout` the engine's.
    """
    parts = [_advantage, _overlong, _loss, _ratio, _KL, _entropy, _balance, _importance, _mask]
    texts = {part.__name__[1:]: part(config) for part in (*parts, _sampling, _steps, _truncated)}
    body = "\n".join(f"  {name:<11} {text}" for name, text in texts.items() if text)
    return f"objective: {preset_title(config)}\n{body}"


def _number(value: float) -> str:
    return f"{value:.10g}"


def _advantage(config: RunConfig) -> str:
    group_size = config.rollout.group_size
    formula = "A_i = r_i − mean(r)"
    over = f"over the {group_size} responses to a prompt"
    if config.advantage.baseline == "leave_one_out":
        formula = "A_i = r_i − mean(r_j, j ≠ i)"
        over = f"over the other {group_size - 1} responses to a prompt"
    if config.advantage.normalize_std:
        formula = f"A_i = (r_i − mean(r)) / (std(r) + {STD_EPS})"
        over += f", std with {group_size} − 1"
    coef, buffer = config.advantage.kl_reward_coef, config.reward.overlong_buffer_tokens
    if coef > 0 or buffer > 0:
        over += "; r_i = reward"
        over += " + overlong_i" if buffer > 0 else ""
        over += f" − {_number(coef)} Σ_t (logp_old − logp_ref)" if coef > 0 else ""
    return f"{formula}   {over}"


def _overlong(config: RunConfig) -> str:
    buffer, longest = config.reward.overlong_buffer_tokens, config.rollout.max_response_tokens
    if buffer == 0:
        return ""
    penalty, start = _number(config.reward.overlong_penalty), longest - buffer
    return f"overlong_i = −{penalty} · max(|o_i| − {start}, 0) / {buffer}   |o_i| ≤ {longest}"


def _bounded(ratio: str, config: RunConfig) -> str:
    low, high = _number(1 - config.loss.clip_low), _number(1 + config.loss.clip_high)
    return f"min({ratio}, {high})" if low == "0" else f"clip({ratio}, {low}, {high})"


def _loss(config: RunConfig) -> str:
    loss, size = config.loss, config.batch.global_batch_size
    ratio = "s_i" if loss.surrogate == "gspo" else "ρ_it"
    bounded = _bounded(ratio, config)
    term = {"reinforce": "−A_i logp_it", "cispo": f"−sg[{bounded}] A_i logp_it"}.get(
        loss.surrogate, f"−min({ratio} A_i, {bounded} A_i)"
    )
    if loss.importance_cap > 0:
        term = f"{'w_it' if loss.importance_level == 'token' else 'w_i'} · {term}"
    if loss.kl_coef > 0:
        term = f"{term} + {_number(loss.kl_coef)} KL_it"
    if loss.entropy_coef > 0:
        term = f"{term} − {_number(loss.entropy_coef)} H_it"
    if loss.kl_coef > 0 or loss.entropy_coef > 0:
        term = f"[ {term} ]"
    responses = "Σ_i" if loss.sequence_mask == "none" else "Σ_i m_i"
    length = config.rollout.max_response_tokens
    divided, note = {
        "constant": (f"1/({size}·{length}) {responses} Σ_t", f"constant length {length}"),
        "response": (f"1/{size} {responses} 1/|o_i| Σ_t", "|o_i| tokens of response i"),
        "tokens": (f"1/(Σ_i |o_i|) {responses} Σ_t", f"|o_i| tokens of each of {size} responses"),
        "none": (f"1/{size} {responses} Σ_t", f"{size} responses, lengths do not divide"),
    }[loss.length_normalizer]
    return f"{divided} {term}   {note}"


def _ratio(config: RunConfig) -> str:
    temperature = f"logits divided by temperature {_number(config.rollout.temperature)}"
    if config.loss.surrogate == "reinforce":
        return f"none: the gradient is the policy's own   {temperature}"
    ratio = "ρ_it = exp(logp_it − logp_old_it)"
    if config.loss.surrogate == "gspo":
        ratio = "s_i = exp(1/|o_i| Σ_t (logp_it − logp_old_it))"
    return f"{ratio}   {temperature}"


def _KL(config: RunConfig) -> str:
    coef, kind = config.loss.kl_coef, config.loss.kl_kind
    if coef > 0:
        forms = {"k1": "−d", "k2": "d²/2", "k3": "exp(d) − 1 − d"}
        return f"KL_it = {forms[kind]}, d = logp_ref − logp ({kind}), coefficient {_number(coef)}"
    if config.needs_ref_policy:
        return "no KL term in the loss (in the reward, above)"
    return "no KL term, no reference policy"


def _entropy(config: RunConfig) -> str:
    coef = config.loss.entropy_coef
    return f"H_it of the policy at token t, bonus {_number(coef)}" if coef > 0 else ""


def _balance(config: RunConfig) -> str:
    coef = config.loss.balance_coef
    term = "Σ_layers 1/N Σ_i Σ_e f_ie P_ie, f, P: expert e's load and scores in sample i"
    return f"{term}, coefficient {_number(coef)}" if coef > 0 else ""


def _importance(config: RunConfig) -> str:
    cap = _number(config.loss.importance_cap)
    if config.loss.importance_cap == 0:
        return "correction off: the engine's logprobs are only compared with the policy's"
    if config.loss.importance_level == "sequence":
        return f"w_i = min(exp(Σ_t (logp_old_it − logp_rollout_it)), {cap}), no gradient"
    return f"w_it = min(exp(logp_old_it − logp_rollout_it), {cap}), no gradient"


def _mask(config: RunConfig) -> str:
    kind = config.loss.sequence_mask
    if kind == "none":
        return ""
    low, high = _number(config.loss.sequence_mask_low), _number(config.loss.sequence_mask_high)
    mean = "1/|o_i| " if kind == "geometric" else ""
    ratio = f"exp({mean}Σ_t (logp_old_it − logp_rollout_it))"
    return f"m_i = 1 if {low} ≤ {ratio} ≤ {high}, else 0; counted in every mean"


def _sampling(config: RunConfig) -> str:
    if config.rollout.max_rounds == 1:
        return ""
    rounds = f"in at most {config.rollout.max_rounds} rounds of generation"
    return f"groups whose rewards are all alike are replaced by further prompts, {rounds}"


def _steps(config: RunConfig) -> str:
    rollout, steps = config.rollout, config.num_optimizer_steps
    product = f"{rollout.num_prompts_per_step} prompts × {rollout.group_size}"
    made = f"{product} = {config.responses_per_step} responses per rollout"
    if steps == 1 and config.loss.surrogate == "reinforce":
        return f"{made}, 1 optimizer step: on-policy"
    if steps == 1:
        ratio = "s_i" if config.loss.surrogate == "gspo" else "ρ_it"
        return (
            f"{made}, 1 optimizer step: on-policy, every {ratio} is 1, clipping never acts; "
            "logp_old is the current logp, detached (no extra pass)"
        )
    steps_of = f"{steps} optimizer steps of {config.batch.global_batch_size}"
    return f"{made}, {steps_of}: logp_old is computed once, before the first"


def _truncated(config: RunConfig) -> str:
    length = config.rollout.max_response_tokens
    rule = f"no end within {length} tokens: reward 0, kept in the group's mean"
    if config.loss.mask_truncated:
        if config.loss.length_normalizer == "tokens":
            return f"{rule}, not trained on, their tokens not counted"
        return f"{rule}, not trained on but counted among the {config.batch.global_batch_size}"
    return f"{rule} and trained on"
