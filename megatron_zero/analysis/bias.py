"""How much each response weighs in the gradient, and what normalisation changes about it.

The policy gradient of a step is a sum over tokens of (advantage * token weight) times the gradient
of that token's logprob. GRPO divides the advantage by its group's standard deviation and weighs a
token by 1 / |response|; Dr. GRPO does neither (arXiv 2503.20783, section 3.1). Recorded rollouts
are weighed under both, and under the two in between, so that each normalisation is seen alone.
"""

import torch

OBJECTIVES = {  # name -> advantage.normalize_std, loss.length_normalizer
    "dr_grpo": (False, "constant"),
    "only_std": (True, "constant"),
    "only_length": (False, "response"),
    "grpo": (True, "response"),
}


def weight_shares(
    advantages: torch.Tensor, lengths: torch.Tensor, length_normalizer: str
) -> torch.Tensor:
    """Each response's share of a step's gradient weight, sum_t |advantage * token weight|.

        |advantage|              with `response`: each token weighs 1 / |response|
        |advantage| * |response| with any other: all tokens weigh the same

    Shares, because what scales a whole step is taken out by the optimizer.

    Args:
        advantages: [P, G] float.
        lengths: [P, G], in tokens.
        length_normalizer: as `loss.length_normalizer`.

    Returns:
        [P, G], of sum 1; nan where no response of the step has any weight.

    Example:
        advantages [[0.5, -0.5]] of 10 and 30 tokens: [[0.25, 0.75]], with `response` [[0.5, 0.5]].
    """
    num_tokens = lengths.clamp(max=1) if length_normalizer == "response" else lengths
    weights = advantages.abs() * num_tokens
    return weights / weights.sum()
