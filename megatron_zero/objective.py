"""The resolved objective as a formula with its numbers, and the presets that name it.

Dr. GRPO and GRPO are one function with two settings: whether the group's rewards are divided by
their standard deviation, and whether a response's sum is divided by a constant or by its own
length (arXiv 2503.20783). A run that says `drgrpo` in its name can still have either set
differently, so the program prints what it is about to optimise, not what it is called.

Standard library only: a launcher prints the same text.
"""

from megatron_zero.config import RunConfig, replace

STD_EPS = "1e-8"  # as in advantages.STD_EPS, which needs torch to be read

_TITLES = {  # (advantage.normalize_std, loss.length_normalizer)
    (False, "constant"): "Dr. GRPO",
    (True, "response"): "GRPO",
    (False, "response"): "GRPO without its standard deviation (length bias only)",
    (True, "constant"): "GRPO with a constant length (difficulty bias only)",
}


def drgrpo(config: RunConfig) -> RunConfig:
    """Dr. GRPO: neither the group's standard deviation nor the response's length divides."""
    return _with(config, normalize_std=False, length_normalizer="constant")


def grpo(config: RunConfig) -> RunConfig:
    """GRPO: both divide."""
    return _with(config, normalize_std=True, length_normalizer="response")


def length_bias_only(config: RunConfig) -> RunConfig:
    """Ablation: each response is divided by its length, as in GRPO; the advantage is Dr. GRPO's."""
    return _with(config, normalize_std=False, length_normalizer="response")


def std_bias_only(config: RunConfig) -> RunConfig:
    """Ablation: advantages are divided by the group's deviation, as in GRPO; lengths are not."""
    return _with(config, normalize_std=True, length_normalizer="constant")


PRESETS = {
    "drgrpo": drgrpo,
    "grpo": grpo,
    "length_bias_only": length_bias_only,
    "std_bias_only": std_bias_only,
}


def _with(config: RunConfig, *, normalize_std: bool, length_normalizer: str) -> RunConfig:
    return replace(
        config,
        advantage=replace(config.advantage, normalize_std=normalize_std),
        loss=replace(config.loss, length_normalizer=length_normalizer),
    )


def preset_title(config: RunConfig) -> str:
    """What the two settings together are called."""
    return _TITLES[config.advantage.normalize_std, config.loss.length_normalizer]


def describe_objective(config: RunConfig) -> str:
    """Several lines: the objective of one optimizer step, every number from `config`.

    Indices: i over responses, t over response tokens. `logp` are log-probabilities at the sampling
    temperature: `old` the policy's before the rollout's first update, `ref` the frozen reference
    policy's, `rollout` the engine's.
    """
    lines = [
        ("advantage", _advantage(config)),
        ("loss", _loss(config)),
        ("ratio", _ratio(config)),
        ("KL", _kl(config)),
        ("importance", _importance(config)),
        ("steps", _steps(config)),
        ("truncated", _truncated(config)),
    ]
    body = "\n".join(f"  {name:<11} {text}" for name, text in lines)
    return f"objective: {preset_title(config)}\n{body}"


def _number(value: float) -> str:
    return f"{value:.10g}"


def _advantage(config: RunConfig) -> str:
    group_size = config.rollout.group_size
    formula = "A_i = r_i − mean(r)"
    over = f"over the {group_size} responses to a prompt"
    if config.advantage.normalize_std:
        formula = f"A_i = (r_i − mean(r)) / (std(r) + {STD_EPS})"
        over += f", std with {group_size} − 1"
    coef = config.advantage.kl_reward_coef
    if coef > 0:
        over += f"; r_i = reward − {_number(coef)} Σ_t (logp_old − logp_ref)"
    return f"{formula}   {over}"


def _loss(config: RunConfig) -> str:
    loss, size = config.loss, config.batch.global_batch_size
    low, high = _number(1 - loss.clip_low), _number(1 + loss.clip_high)
    term = f"−min(ρ_it A_i, clip(ρ_it, {low}, {high}) A_i)"
    if loss.importance_cap > 0:
        term = f"w_it · {term}"
    if loss.kl_coef > 0:
        term = f"[ {term} + {_number(loss.kl_coef)} KL_it ]"
    if loss.length_normalizer == "constant":
        length = config.rollout.max_response_tokens
        return f"1/({size}·{length}) Σ_i Σ_t {term}   constant length {length}"
    return f"1/{size} Σ_i 1/|o_i| Σ_t {term}   |o_i| tokens of response i"


def _ratio(config: RunConfig) -> str:
    temperature = _number(config.rollout.temperature)
    return f"ρ_it = exp(logp_it − logp_old_it)   logits divided by temperature {temperature}"


def _kl(config: RunConfig) -> str:
    coef, kind = config.loss.kl_coef, config.loss.kl_kind
    if coef > 0:
        forms = {"k1": "−d", "k2": "d²/2", "k3": "exp(d) − 1 − d"}
        return f"KL_it = {forms[kind]}, d = logp_ref − logp ({kind}), coefficient {_number(coef)}"
    if config.needs_ref_policy:
        return "no KL term in the loss (in the reward, above)"
    return "no KL term, no reference policy"


def _importance(config: RunConfig) -> str:
    cap = config.loss.importance_cap
    if cap > 0:
        return f"w_it = min(exp(logp_old_it − logp_rollout_it), {_number(cap)}), no gradient"
    return "correction off: the engine's logprobs are only compared with the policy's"


def _steps(config: RunConfig) -> str:
    rollout, steps = config.rollout, config.num_optimizer_steps
    made = (
        f"{rollout.num_prompts_per_step} prompts × {rollout.group_size} = "
        f"{config.responses_per_step} responses per rollout"
    )
    if steps == 1:
        return (
            f"{made}, 1 optimizer step: on-policy, every ρ_it is 1, clipping never acts; "
            "logp_old is the current logp, detached (no extra pass)"
        )
    return (
        f"{made}, {steps} optimizer steps of {config.batch.global_batch_size}: "
        "logp_old is computed once, before the first"
    )


def _truncated(config: RunConfig) -> str:
    length = config.rollout.max_response_tokens
    rule = f"no end within {length} tokens: reward 0, kept in the group's mean"
    if config.loss.mask_truncated:
        return f"{rule}, not trained on but counted among the {config.batch.global_batch_size}"
    return f"{rule} and trained on"
