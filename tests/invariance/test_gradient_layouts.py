"""The same gradient for every layout of four processes: one rollout, one reference.

In float64 every layout must give what one process gives, to 1e-10; one process must give what the
objective, written out on transformers' model, gives. transformers computes norms and rotary angles
in float32 whatever the model's dtype, so that comparison is to 1e-6 (and to 1e-5 where decisive
routers and YaRN amplify it). Megatron's distributed optimizer and its clipping take float32 alone:
with them the weights are compared, in float32.
"""

import functools
import math
import sys
from pathlib import Path

import pytest
import torch

from tests import families, tiny
from tests.launch import REPOSITORY, torchrun
from tests.layouts import parse

WORKER = REPOSITORY / "tests" / "invariance" / "gradient_worker.py"
NAMES = ["qwen2", "qwen2_tied", "qwen3_moe", "deepseek_v3", "deepseek_v2_lite", "qwen3_yarn"]
NARROW = "qwen2_narrow"  # of the long response

# m50: one or two samples in a microbatch; m2000: all in one; see tests/layouts.py
BY_WORLD = {
    1: [f"m2000-f64-{name}" for name in NAMES]
    + [f"m2000-{name}" for name in NAMES[:3]]
    + ["m50-f64-qwen2", "m100-f64-reversed-qwen2_tied", "m4000-f64-math-qwen2"]
    + ["m2000-f64-balance-qwen3_moe", "m60-f64-balance-qwen3_moe", "m9000-f64-long-qwen2_narrow"],
    2: [
        "tp2-m100-f64-qwen2",
        "pp2-m100-f64-reversed-qwen2",
        "do-m50-qwen2_tied",
        "pp2-vp2-m60-f64-qwen2_tied",
        "cp2-m600-f64-math-qwen2",
        "do-ep2-m100-qwen3_moe",
        "tp2-sp-etp2-m100-f64-qwen3_moe",
        "cp2-m200-f64-deepseek_v3",
        "cp2-m9000-f64-long-qwen2_narrow",
        "tp2-sp-ep2-m100-f64-balance-qwen3_moe",
        "tp2-sp-ep2-m200-f64-deepseek_v2_lite",
    ],
    4: [
        "tp4-m200-f64-qwen2_tied",
        "m60-f64-qwen2",
        "tp2-pp2-m100-f64-qwen2",
        "tp2-sp-do-m60-qwen2",
        "tp2-sp-cp2-m200-f64-qwen2_tied",
        "pp2-vp2-cp2-m200-f64-qwen2_tied",
        "tp2-sp-cp2-m200-f64-qwen3_yarn",
        "pp2-vp2-m600-f64-math-qwen2",
        "cp2-ep2-m200-f64-balance-qwen3_moe",
        "tp2-sp-ep2-etp2-m200-f64-qwen3_moe",
        "tp2-sp-pp2-ep2-m200-f64-deepseek_v3",
    ],
}
# With `pytest --all-layouts`: what docs/parallel_layouts.md lists, minutes more.
MORE = {
    1: ["m60-f64-deepseek_v3", "m600-f64-math-qwen2"],
    2: [
        "tp2-sp-m100-f64-qwen2_tied",
        "pp2-m60-f64-qwen2_tied",
        "m100-f64-qwen2",
        "m50-qwen2_tied",
        "pp2-vp2-m100-f64-qwen2",
        "cp2-m200-f64-qwen2",
        "cp2-m100-qwen2_tied",
        "ep2-m100-f64-qwen3_moe",
        "pp2-m100-f64-balance-qwen3_moe",
        "cp2-ep2-m200-f64-qwen3_moe",
        "tp2-sp-ep2-m100-f64-deepseek_v3",
        "pp2-m100-f64-deepseek_v3",
    ],
    4: [
        "pp4-m100-f64-qwen2",
        "cp4-m200-f64-qwen2",
        "do-m60-qwen2",
        "tp2-sp-m60-f64-qwen2",
        "tp2-cp2-m200-f64-qwen2",
        "pp2-cp2-m200-f64-qwen2",
        "tp2-sp-pp2-vp2-m100-f64-qwen2_tied",
        "pp2-do-m60-qwen2_tied",
        "cp2-do-m100-qwen2",
        "tp2-sp-pp2-m600-f64-math-qwen2",
        "tp2-sp-cp2-m600-f64-math-qwen2",
        "m600-f64-math-qwen2",
        "tp2-sp-pp2-ep2-m100-f64-qwen3_moe",
        "tp2-sp-ep4-m100-f64-qwen3_moe",
        "ep2-do-m60-qwen3_moe",
        "ep2-m60-f64-deepseek_v3",
        "pp2-vp2-ep2-m60-f64-deepseek_v3",
    ],
}
if "--all-layouts" in sys.argv:
    BY_WORLD = {world: [*texts, *MORE[world]] for world, texts in BY_WORLD.items()}
if not tiny.SHARED.is_dir():  # real problems are not part of the project
    BY_WORLD = {w: [t for t in texts if "-math-" not in t] for w, texts in BY_WORLD.items()}
CASES = [(text, world) for world, texts in BY_WORLD.items() for text in texts]
EXACT = [(text, world) for text, world in CASES if "-f64-" in text]
SINGLE = [text for text in BY_WORLD[1] if text.startswith("m2000-")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gradients")
    for name in [*NAMES, NARROW]:
        families.write(name, directory / name)
    for world, texts in BY_WORLD.items():
        torchrun(world, WORKER, directory, *texts, timeout_s=600)
    return directory


def reference_of(text: str) -> str:
    """The single process with everything in one microbatch, of the same precision."""
    case = parse(text)
    precision = "-f64" if case.dtype == "fp64" else ""
    samples = {"math": "4000-f64-math", "long": "9000-f64-long"}.get(
        case.samples, f"2000{precision}{'-balance' if case.balance_coef else ''}"
    )
    return f"m{samples}-{case.family}"


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    error = sum((found[n].double() - t.double()).square().sum().item() for n, t in expected.items())
    return math.sqrt(error / sum(t.double().square().sum().item() for t in expected.values()))


@functools.cache
def literal_gradients(family: str, balance_coef: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Dr. GRPO with clipping, response by response, in float64 on transformers' model.

    The loss is returned without the balance term, the gradients are with it.
    """
    model = families.hf_model(family).double()
    model.set_experts_implementation("eager")  # the grouped one has no float64
    samples = tiny.samples()
    total = torch.zeros((), dtype=torch.float64)
    balance = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor([sample.token_ids])
        options = {"output_router_logits": True} if balance_coef else {}
        output = model(ids[:, :-1], **options)
        for router_logits in output.router_logits if balance_coef else ():
            balance = balance + literal_balance(router_logits, model.config.num_experts_per_tok)
        logprobs = output.logits[0].log_softmax(-1)
        labels = ids[0, 1:]
        new = logprobs.gather(1, labels[:, None])[:, 0][sample.prompt_length - 1 :]
        shift = 0.3 * torch.sin(labels.float()).double()[sample.prompt_length - 1 :]
        old = new.detach() + shift
        ratio = torch.exp(new - old)
        clipped = torch.clamp(ratio, 0.8, 1.2)
        total = total - torch.minimum(ratio * sample.advantage, clipped * sample.advantage).sum()
    loss = total / (len(samples) * tiny.MAX_RESPONSE)
    (loss + balance_coef * balance / len(samples)).backward()
    gradients: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        if param.grad is not None:
            gradients |= _as_stored(name, param.grad)
    return loss.item(), gradients


def literal_balance(router_logits: torch.Tensor, topk: int) -> torch.Tensor:
    """Sum over experts of load x mean score, of one sequence in one layer."""
    scores = router_logits.double().softmax(-1)
    num_tokens, num_experts = scores.shape
    total = torch.zeros((), dtype=torch.float64)
    for expert in range(num_experts):
        load = sum(expert in row.topk(topk).indices.tolist() for row in scores)
        total = total + num_experts / (topk * num_tokens) * load * scores[:, expert].mean()
    return total


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


@pytest.mark.parametrize("text", SINGLE)
def test_one_process_equals_the_literal_objective(text: str, results: Path) -> None:
    result = torch.load(results / f"{text}-1.pt")
    case = parse(text)
    family = case.family
    loss, gradients = literal_gradients(family, case.balance_coef)
    bias = {name for name in result["gradients"] if name.endswith("e_score_correction_bias")}
    assert set(result["gradients"]) - bias == set(gradients)
    bound = 1e-6 if family.startswith("qwen2") else 1e-5
    assert relative_error(result["gradients"], gradients) <= bound
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, gradient in gradients.items():
        difference = (result["gradients"][name].double() - gradient).abs().max().item()
        assert difference / largest <= 3 * bound, name
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    assert result["metrics"]["policy/loss"] == pytest.approx(loss, rel=1e-6)
    assert result["metrics"]["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_the_balance_term_is_the_literal_one_on_the_routers(results: Path) -> None:
    """Routers apart: there the term is most of the gradient."""
    found = torch.load(results / "m2000-f64-balance-qwen3_moe-1.pt")
    without = torch.load(results / "m2000-f64-qwen3_moe-1.pt")["gradients"]
    _, expected = literal_gradients("qwen3_moe", parse("m1-balance-x").balance_coef)
    routers = {n: g for n, g in expected.items() if n.endswith("mlp.gate.weight")}
    assert len(routers) == 3
    # Megatron takes the softmax of the scores in float32
    assert relative_error(found["gradients"], routers) <= 1e-6
    assert relative_error(without, routers) > 0.5
    assert found["metrics"]["policy/balance_loss"] > 0.5 * 3 * 0.99  # 1 in a layer when balanced


@pytest.mark.parametrize(("text", "world"), EXACT)
def test_no_sequence_attends_to_its_neighbour(text: str, world: int, results: Path) -> None:
    changed, others = torch.load(results / f"{text}-{world}.pt")["neighbours"]
    assert others <= 1e-12 * changed and changed > 0.1


@pytest.mark.parametrize(("text", "world"), EXACT)
def test_every_layout_has_the_gradient_of_one_process(
    text: str, world: int, results: Path, record_property
) -> None:
    result = torch.load(results / f"{text}-{world}.pt")
    reference = torch.load(results / f"{reference_of(text)}-1.pt")
    loss, expected = (r["metrics"]["policy/loss"] for r in (result, reference))
    errors = {
        "loss": abs(loss - expected) / abs(expected),
        "gradients": relative_error(result["gradients"], reference["gradients"]),
        "weights": relative_error(result["weights"], reference["weights"]),
    }
    record_property("layout", {"layout": text, "processes": world, **errors})
    # Megatron takes the sigmoid of V3's router scores, and the softmax of those that are balanced,
    # in float32, whatever their dtype
    bound = 1e-8 if text.endswith("deepseek_v3") or "-balance-" in text else 1e-10
    assert max(errors.values()) <= bound, errors
    largest = max(g.abs().max().item() for g in reference["gradients"].values())
    for name, gradient in reference["gradients"].items():
        difference = (result["gradients"][name] - gradient).abs().max().item()
        assert difference / largest <= bound, name
    for name, value in reference["metrics"].items():
        # metrics of tokens are kept in float32
        assert result["metrics"][name] == pytest.approx(value, rel=2e-5, abs=1e-9), name
    assert 0.05 < result["metrics"]["policy/clip_frac"] < 0.95  # clipping is part of what agrees


@pytest.mark.parametrize(("text", "world"), [case for case in CASES if case not in EXACT])
def test_float32_weights_after_three_steps_agree(
    text: str, world: int, results: Path, record_property
) -> None:
    result = torch.load(results / f"{text}-{world}.pt")
    reference = torch.load(results / f"{reference_of(text)}-1.pt")
    error = relative_error(result["weights"], reference["weights"])
    record_property("layout", {"layout": text, "processes": world, "weights": error})
    assert error <= 1e-5
    norm = reference["metrics"]["policy/grad_norm"]
    assert result["metrics"]["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(("text", "world"), [case for case in EXACT if "reversed" not in case[0]])
def test_kl_in_reward_is_each_responses_own_sum_in_every_layout(
    text: str, world: int, results: Path
) -> None:
    reference = torch.load(results / f"{reference_of(text)}-1.pt")["kl_to_ref"]
    ours = torch.load(results / f"{text}-{world}.pt")["kl_to_ref"]
    num_samples = len(tiny.samples(parse(text).samples))
    assert reference.abs().max() > 0.1 and len(set(reference.tolist())) == num_samples
    assert (ours - reference).abs().max() <= 1e-6 * reference.abs().max()
