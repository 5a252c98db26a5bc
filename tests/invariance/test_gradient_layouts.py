"""The same gradient for every layout: against a literal objective on transformers in float64.

One rollout with ragged responses and a vocabulary that no layout divides goes through every
layout that four processes allow, every microbatch size, packing and order. Loss, gradient norm,
every parameter's gradient and the weights after an optimizer step are compared.
"""

import math
from pathlib import Path

import pytest
import torch

from tests import families, tiny
from tests.launch import REPOSITORY, torchrun

WORKER = REPOSITORY / "tests" / "invariance" / "gradient_worker.py"

# tp.pp.sp.ep.etp.max_tokens.family; 50 tokens: one or two samples in a microbatch; 2000: all in one
DENSE, TIED, MOE, V3 = "qwen2", "qwen2_tied", "qwen3_moe", "deepseek_v3"
V2 = "deepseek_v2_lite"
BY_WORLD = {
    1: [f"1.1.0.1.1.2000.{family}" for family in (DENSE, TIED, MOE, V3, V2)]
    + [f"1.1.0.1.1.50.{DENSE}", f"1.1.0.1.1.100.{TIED}", f"1.1.0.1.1.60.{V3}"],
    2: [
        f"2.1.0.1.1.100.{DENSE}",
        f"2.1.1.1.1.100.{TIED}",
        f"1.2.0.1.1.100.{DENSE}",
        f"1.2.0.1.1.60.{TIED}",
        f"1.1.0.1.1.100.{DENSE}",
        f"1.1.0.1.1.50.{TIED}",
        f"1.1.0.2.1.100.{MOE}",
        f"2.1.1.1.2.100.{MOE}",
        f"2.1.1.2.1.100.{V3}",
        f"1.2.0.1.1.100.{V3}",
        f"2.1.1.2.1.100.{V2}",
    ],
    4: [
        f"4.1.0.1.1.100.{TIED}",
        f"2.2.0.1.1.100.{DENSE}",
        f"2.2.1.1.1.100.{TIED}",
        f"2.1.1.1.1.60.{DENSE}",
        f"1.2.0.1.1.60.{TIED}",
        f"1.1.0.1.1.60.{DENSE}",
        f"2.2.1.2.1.100.{MOE}",
        f"2.1.1.4.1.100.{MOE}",
        f"2.1.1.2.2.100.{MOE}",
        f"1.1.0.2.1.60.{V3}",
        f"2.2.1.2.1.60.{V3}",
    ],
}
CASES = [(text, world) for world, texts in BY_WORLD.items() for text in texts]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gradients")
    for family in (DENSE, TIED, MOE, V3, V2):
        families.write(family, directory / family)
    for world, texts in BY_WORLD.items():
        torchrun(world, WORKER, directory, *texts)
    return directory


def literal_gradients(family: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Dr. GRPO with clipping, response by response, in float64 on transformers' model."""
    model = families.hf_model(family).double()
    model.set_experts_implementation("eager")  # the grouped one has no float64
    samples = tiny.samples()
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor([sample.token_ids])
        logprobs = model(ids[:, :-1]).logits[0].log_softmax(-1)
        labels = ids[0, 1:]
        new = logprobs.gather(1, labels[:, None])[:, 0][sample.prompt_length - 1 :]
        shift = 0.3 * torch.sin(labels.float()).double()[sample.prompt_length - 1 :]
        old = new.detach() + shift
        ratio = torch.exp(new - old)
        clipped = torch.clamp(ratio, 0.8, 1.2)
        total = total - torch.minimum(ratio * sample.advantage, clipped * sample.advantage).sum()
    loss = total / (len(samples) * tiny.MAX_RESPONSE)
    loss.backward()
    gradients: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        if param.grad is not None:
            gradients |= _as_stored(name, param.grad)
    return loss.item(), gradients


def _as_stored(name: str, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the checkpoint's names: transformers stacks experts in memory, not in files."""
    prefix, stacked, which = name.partition("mlp.experts.")
    if not stacked:
        return {name: gradient}
    found = {}
    for expert, own in enumerate(gradient):
        parts = {"down_proj": own}
        if which == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), own.chunk(2), strict=True))
        for part, tensor in parts.items():
            found[f"{prefix}mlp.experts.{expert}.{part}.weight"] = tensor
    return found


@pytest.fixture(scope="module")
def literal() -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    return {family: literal_gradients(family) for family in (DENSE, TIED, MOE, V3, V2)}


@pytest.mark.parametrize(("text", "world"), CASES)
def test_loss_and_gradients_equal_the_literal_ones(text, world, results, literal) -> None:
    result = torch.load(results / f"{text}.{world}.pt")
    loss, gradients = literal[text.split(".")[-1]]
    bias = {name for name in result["gradients"] if name.endswith("e_score_correction_bias")}
    assert set(result["gradients"]) - bias == set(gradients)
    errors = {n: result["gradients"][n].double() - g for n, g in gradients.items()}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    error = math.sqrt(sum(e.square().sum().item() for e in errors.values()))
    # decisive routers and YaRN amplify the rounding of float32, in every layout alike
    bound = 1e-6 if text.endswith((DENSE, TIED)) else 1e-5
    assert error / norm <= bound
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, difference in errors.items():
        assert difference.abs().max().item() / largest <= 3 * bound, name
    assert result["metrics"]["policy/loss"] == pytest.approx(loss, rel=1e-5)
    assert result["metrics"]["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(("text", "world"), CASES)
def test_weights_after_a_step_and_metrics_equal_the_single_process_ones(
    text, world, results
) -> None:
    family = text.split(".")[-1]
    reference = torch.load(results / f"1.1.0.1.1.2000.{family}.1.pt")
    result = torch.load(results / f"{text}.{world}.pt")
    assert set(result["weights"]) == set(reference["weights"])
    for name, expected in reference["weights"].items():
        # Adam's first step is lr * sign(g): where a gradient is rounding, so is its sign
        moved = reference["gradients"][name].abs() > (
            1e-7 if text.endswith((DENSE, TIED)) else 1e-6
        )
        difference = (result["weights"][name] - expected).abs()
        if name.endswith("e_score_correction_bias"):
            assert not moved.any() and difference.max() == 0
        else:
            assert difference[moved].max().item() <= 2e-5, name
    for name, expected in reference["metrics"].items():
        assert result["metrics"][name] == pytest.approx(expected, rel=2e-5, abs=1e-9), name
    assert 0.05 < result["metrics"]["policy/clip_frac"] < 0.95  # clipping is part of what agrees


# Only dense models: after an update two experts of a token may be so close that rounding chooses.
@pytest.mark.parametrize(("text", "world"), [(t, w) for t, w in CASES if t.endswith((DENSE, TIED))])
def test_kl_in_reward_is_each_responses_own_sum_in_every_layout(text, world, results) -> None:
    family = text.split(".")[-1]
    reference = torch.load(results / f"1.1.0.1.1.2000.{family}.1.pt")["kl_to_ref"]
    ours = torch.load(results / f"{text}.{world}.pt")["kl_to_ref"]
    assert reference.abs().max() > 0.1 and len(set(reference.tolist())) == tiny.NUM_SAMPLES
    assert (ours - reference).abs().max() <= 2e-4 * reference.abs().max()
