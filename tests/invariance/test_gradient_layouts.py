"""The same gradient for every layout: against a literal objective on transformers in float64.

One rollout with ragged responses and a vocabulary that no layout divides goes through every
layout that four processes allow, every microbatch size, packing and order. Loss, gradient norm,
every parameter's gradient and the weights after an optimizer step are compared.
"""

import math
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.launch import REPOSITORY, torchrun

WORKER = REPOSITORY / "tests" / "invariance" / "gradient_worker.py"

# tp.pp.sp.max_tokens.tied; 50 tokens: one or two samples in a microbatch; 2000: all in one
BY_WORLD = {
    1: ["1.1.0.50.0", "1.1.0.100.1", "1.1.0.2000.0", "1.1.0.2000.1"],
    2: ["2.1.0.100.0", "2.1.1.100.1", "1.2.0.100.0", "1.2.0.60.1", "1.1.0.100.0", "1.1.0.50.1"],
    4: ["4.1.0.100.1", "2.2.0.100.0", "2.2.1.100.1", "2.1.1.60.0", "1.2.0.60.1", "1.1.0.60.0"],
}
CASES = [(text, world) for world, texts in BY_WORLD.items() for text in texts]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gradients")
    for world, texts in BY_WORLD.items():
        torchrun(world, WORKER, directory, *texts)
    return directory


def literal_gradients(tied: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Dr. GRPO with clipping, response by response, in float64 on transformers' Qwen2."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron_zero.convert.families import family_for
    from megatron_zero.convert.mapping import Mapping
    from megatron_zero.convert.random_source import RandomSource

    hf_config = tiny.hf_config(tied=tied)
    model = Qwen2ForCausalLM(Qwen2Config(**hf_config)).double()
    source = RandomSource(Mapping(family_for(hf_config), hf_config), 0)
    state = {name: source.read(name) for name in source.names()}
    model.load_state_dict(state, strict=not tied)
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
    return loss.item(), {
        name: param.grad for name, param in model.named_parameters() if param.grad is not None
    }


@pytest.fixture(scope="module")
def literal() -> dict[bool, tuple[float, dict[str, torch.Tensor]]]:
    return {tied: literal_gradients(tied) for tied in (False, True)}


@pytest.mark.parametrize(("text", "world"), CASES)
def test_loss_and_gradients_equal_the_literal_ones(text, world, results, literal) -> None:
    result = torch.load(results / f"{text}.{world}.pt")
    loss, gradients = literal[text.endswith(".1")]
    assert set(result["gradients"]) == set(gradients)
    errors = {n: result["gradients"][n].double() - g for n, g in gradients.items()}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    error = math.sqrt(sum(e.square().sum().item() for e in errors.values()))
    assert error / norm <= 1e-6
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, difference in errors.items():
        assert difference.abs().max().item() / largest <= 3e-6, name
    assert result["metrics"]["policy/loss"] == pytest.approx(loss, rel=1e-5)
    assert result["metrics"]["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(("text", "world"), CASES)
def test_weights_after_a_step_and_metrics_equal_the_single_process_ones(
    text, world, results
) -> None:
    tied = text[-1]
    reference = torch.load(results / f"1.1.0.2000.{tied}.1.pt")
    result = torch.load(results / f"{text}.{world}.pt")
    assert set(result["weights"]) == set(reference["weights"])
    for name, expected in reference["weights"].items():
        # Adam's first step is lr * sign(g): where a gradient is rounding, so is its sign
        moved = reference["gradients"][name].abs() > 1e-7
        error = (result["weights"][name] - expected)[moved].abs().max().item()
        assert error <= 2e-5, (name, error)
    for name, expected in reference["metrics"].items():
        assert result["metrics"][name] == pytest.approx(expected, rel=2e-5, abs=1e-9), name
    assert 0.05 < result["metrics"]["policy/clip_frac"] < 0.95  # clipping is part of what agrees


@pytest.mark.parametrize(("text", "world"), CASES)
def test_kl_in_reward_is_each_responses_own_sum_in_every_layout(text, world, results) -> None:
    reference = torch.load(results / f"1.1.0.2000.{text[-1]}.1.pt")["kl_to_ref"]
    ours = torch.load(results / f"{text}.{world}.pt")["kl_to_ref"]
    assert reference.abs().max() > 0.1 and len(set(reference.tolist())) == tiny.NUM_SAMPLES
    assert (ours - reference).abs().max() <= 2e-4 * reference.abs().max()
