from dataclasses import replace

import pytest

from megatron_zero.advantages import STD_EPS
from megatron_zero.config import (
    AdvantageConfig,
    BatchConfig,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_zero.objective import (
    PRESETS,
    describe_objective,
    drgrpo,
    grpo,
    length_bias_only,
    preset_title,
    std_bias_only,
)

CONFIG = RunConfig(name="a", model=ModelConfig(path="m"))


def line(config: RunConfig, name: str) -> str:
    (found,) = [x for x in describe_objective(config).splitlines() if x.split()[0] == name]
    return found


def test_drgrpo_with_the_paper_numbers():
    text = describe_objective(drgrpo(CONFIG))
    assert text.startswith("objective: Dr. GRPO\n")
    assert "A_i = r_i − mean(r) " in text and "std" not in text
    assert "1/(128·3000) Σ_i Σ_t −min(ρ_it A_i, clip(ρ_it, 0.8, 1.2) A_i)" in text
    assert "no KL term, no reference policy" in text
    assert "correction off" in text
    assert "128 prompts × 8 = 1024 responses per rollout, 8 optimizer steps of 128" in text
    assert "logp_old is computed once" in text
    assert "temperature 1" in text
    assert "reward 0, kept in the group's mean and trained on" in text


def test_grpo():
    text = describe_objective(grpo(CONFIG))
    assert text.startswith("objective: GRPO\n")
    assert "A_i = (r_i − mean(r)) / (std(r) + 1e-8)" in text and "std with 8 − 1" in text
    assert "1/128 Σ_i 1/|o_i| Σ_t −min(" in text
    assert "3000" not in line(grpo(CONFIG), "loss")


def test_the_two_arms_are_between():
    length, std = (
        describe_objective(length_bias_only(CONFIG)),
        describe_objective(std_bias_only(CONFIG)),
    )
    assert "without its standard deviation" in length.splitlines()[0]
    assert "/ (std(r)" not in length and "1/|o_i|" in length
    assert "constant length" in std.splitlines()[0]
    assert "/ (std(r)" in std and "1/(128·3000)" in std


@pytest.mark.parametrize(
    ("preset", "normalize_std", "normalizer"),
    [
        ("drgrpo", False, "constant"),
        ("grpo", True, "response"),
        ("length_bias_only", False, "response"),
        ("std_bias_only", True, "constant"),
    ],
)
def test_presets_set_two_numbers_and_nothing_else(preset, normalize_std, normalizer):
    start = replace(CONFIG, loss=LossConfig(clip_high=0.28), advantage=AdvantageConfig())
    config = PRESETS[preset](start)
    assert config.advantage.normalize_std is normalize_std
    assert config.loss.surrogate == "ppo" and config.advantage.baseline == "group_mean"
    assert config.loss.length_normalizer == normalizer
    undone = replace(config, loss=start.loss, advantage=start.advantage)
    assert undone == start and config.loss.clip_high == 0.28


def test_every_preset_has_its_own_title():
    assert len({preset_title(preset(CONFIG)) for preset in PRESETS.values()}) == len(PRESETS)
    for name, preset in PRESETS.items():
        once = preset(CONFIG)
        assert preset(once) == once, name  # also applied to what another one left


@pytest.mark.parametrize("first", list(PRESETS))
@pytest.mark.parametrize("second", list(PRESETS))
def test_a_preset_takes_the_place_of_another(first, second):
    """What it shares with the one before is set anew, bounds of another surrogate included."""
    start = replace(CONFIG, batch=BatchConfig(global_batch_size=1024))
    config = PRESETS[second](PRESETS[first](start))
    assert preset_title(config) == preset_title(PRESETS[second](start))
    if config.loss.surrogate == "ppo":
        assert config.loss.clip_low == 0.2 and config.loss.clip_high in (0.2, 0.28)


def test_settings_of_its_own_have_no_preset_name():
    for preset, name in (
        ("dapo", "clipped surrogate"),
        ("gspo", "GSPO's surrogate"),
        ("cispo", "CISPO's surrogate"),
    ):
        config = PRESETS[preset](CONFIG)
        config = replace(config, loss=replace(config.loss, clip_high=0.5))
        assert preset_title(config) == f"{name} with settings of its own"
    without = replace(PRESETS["dapo"](CONFIG), rollout=CONFIG.rollout)
    assert preset_title(without) == "clipped surrogate with settings of its own"


def test_dapo_with_its_numbers():
    rollout = RolloutConfig(max_response_tokens=20480)
    batch = BatchConfig(max_tokens_per_microbatch=32768)
    text = describe_objective(PRESETS["dapo"](replace(CONFIG, rollout=rollout, batch=batch)))
    assert text.startswith("objective: DAPO\n")
    assert "1/(Σ_i |o_i|) Σ_i Σ_t −min(ρ_it A_i, clip(ρ_it, 0.8, 1.28) A_i)" in text
    assert "/ (std(r) + 1e-8)" in text and "r_i = reward + overlong_i" in text
    assert "overlong_i = −0.5 · max(|o_i| − 16384, 0) / 4096   |o_i| ≤ 20480" in text
    assert "replaced by further prompts, in at most 8 rounds" in text


def test_gspo_with_its_numbers():
    text = describe_objective(PRESETS["gspo"](CONFIG))
    assert text.startswith("objective: GSPO\n")
    assert "1/128 Σ_i 1/|o_i| Σ_t −min(s_i A_i, clip(s_i, 0.9997, 1.0004) A_i)" in text
    assert "s_i = exp(1/|o_i| Σ_t (logp_it − logp_old_it))" in text
    one_step = replace(PRESETS["gspo"](CONFIG), batch=BatchConfig(global_batch_size=1024))
    assert "every s_i is 1" in line(one_step, "steps")


def test_cispo_with_its_numbers():
    config = PRESETS["cispo"](CONFIG)
    assert "−sg[min(ρ_it, 5)] A_i logp_it" in line(config, "loss")
    config = replace(config, loss=replace(config.loss, clip_low=0.2))
    assert "−sg[clip(ρ_it, 0.8, 5)] A_i logp_it" in line(config, "loss")


def test_rloo_with_its_numbers():
    config = PRESETS["rloo"](CONFIG)
    assert "A_i = r_i − mean(r_j, j ≠ i)   over the other 7 responses" in line(config, "advantage")
    assert "1/1024 Σ_i Σ_t −A_i logp_it" in line(config, "loss")
    assert "1 optimizer step: on-policy" in line(config, "steps")
    assert line(config, "ratio").split()[1] == "none:"


def test_what_is_switched_on_is_printed():
    loss = LossConfig(
        entropy_coef=0.01,
        importance_cap=3.0,
        importance_level="sequence",
        sequence_mask="geometric",
        sequence_mask_low=0.99,
        sequence_mask_high=1.01,
        length_normalizer="tokens",
        mask_truncated=True,
    )
    config = replace(CONFIG, loss=loss)
    assert "Σ_i m_i Σ_t [ w_i · −min(" in line(config, "loss")
    assert "A_i) − 0.01 H_it ]" in line(config, "loss")
    assert "bonus 0.01" in line(config, "entropy")
    assert "min(exp(Σ_t (logp_old_it − logp_rollout_it)), 3)" in line(config, "importance")
    mask = line(config, "mask")
    assert "0.99 ≤ exp(1/|o_i| Σ_t (logp_old_it − logp_rollout_it)) ≤ 1.01" in mask
    assert "their tokens not counted" in line(config, "truncated")
    config = replace(config, loss=replace(loss, sequence_mask="product"))
    assert "0.99 ≤ exp(Σ_t (" in line(config, "mask")
    names = [row.split()[0] for row in describe_objective(CONFIG).splitlines()]
    assert not {"entropy", "mask", "sampling", "overlong"} & set(names)


def test_the_std_epsilon_is_the_one_that_is_used():
    assert float("1e-8") == STD_EPS
    assert f"{STD_EPS:.0e}".replace("e-0", "e-") in describe_objective(grpo(CONFIG))


def test_every_number_comes_from_the_config():
    config = replace(
        CONFIG,
        rollout=RolloutConfig(
            num_prompts_per_step=6, group_size=5, max_response_tokens=77, temperature=0.7
        ),
        batch=BatchConfig(global_batch_size=15),
        loss=LossConfig(
            clip_low=0.1,
            clip_high=0.3,
            kl_coef=0.02,
            kl_kind="k2",
            importance_cap=2.5,
            mask_truncated=True,
        ),
    )
    text = describe_objective(config)
    assert "over the 5 responses" in text
    assert (
        "1/(15·77) Σ_i Σ_t [ w_it · −min(ρ_it A_i, clip(ρ_it, 0.9, 1.3) A_i) + 0.02 KL_it ]" in text
    )
    assert "d²/2" in text and "coefficient 0.02" in text
    assert "min(exp(logp_old_it − logp_rollout_it), 2.5)" in text
    assert "temperature 0.7" in text
    assert "6 prompts × 5 = 30 responses per rollout, 2 optimizer steps of 15" in text
    assert "not trained on but counted among the 15" in text and "within 77 tokens" in text
    for stale in ("128", "3000", "0.8", "1.2"):
        assert stale not in text


def test_one_optimizer_step_is_on_policy_without_an_extra_pass():
    text = line(replace(CONFIG, batch=BatchConfig(global_batch_size=1024)), "steps")
    assert "every ρ_it is 1" in text and "no extra pass" in text and "detached" in text
    assert "on-policy" not in line(CONFIG, "steps")


def test_kl_in_the_reward():
    config = replace(CONFIG, advantage=AdvantageConfig(kl_reward_coef=0.05))
    assert "reward − 0.05 Σ_t (logp_old − logp_ref)" in line(config, "advantage")
    assert "no reference policy" not in line(config, "KL")


@pytest.mark.parametrize(("kind", "form"), [("k1", "−d"), ("k3", "exp(d) − 1 − d")])
def test_kl_estimators(kind, form):
    config = replace(CONFIG, loss=LossConfig(kl_coef=0.1, kl_kind=kind))
    assert f"KL_it = {form}, d = logp_ref − logp ({kind})" in line(config, "KL")
