"""Log-probabilities and entropy from hidden states: the output projection, a chunk at a time.

The vocabulary is split over tensor parallelism. Logits exist for one chunk of tokens only, in the
forward pass and, computed once more, in the backward pass: never [R, V], in any dtype.
"""

from typing import Any

import torch
import torch.distributed as dist

CHUNK_ELEMENTS = 2**24  # logits worked on at once: 64 MiB in float32, large against a kernel launch


class _LinearLogprobs(torch.autograd.Function):
    """Two all-reduces forward (the maximum; then three sums), each over [R] values.

    With x = h w' / temperature and p = softmax(x): logprob = x_label - logsumexp(x),
    entropy = logsumexp(x) - E_p[x], and so
    d logprob / d x = 1[label] - p,   d entropy / d x = -p (x - E_p[x]).

    One pass suffices: sums relative to a rank's own maximum m are shifted to the common one M by
    sum exp(x - M) = e^d A  and  sum exp(x - M) (x - M) = e^d (B + d A),  d = m - M.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        group: dist.ProcessGroup,
        real_width: int,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = hidden.size(0)
        compute = torch.promote_types(hidden.dtype, torch.float32)
        local = labels - group.rank() * weight.size(0)
        is_local = (local >= 0) & (local < real_width)
        local = local.clamp(0, max(real_width - 1, 0))
        own_maximum = torch.full((num_tokens,), -torch.inf, dtype=compute, device=hidden.device)
        sums = torch.zeros(3, num_tokens, dtype=compute, device=hidden.device)
        for rows in _chunks(num_tokens, real_width):
            x = _scaled_logits(hidden[rows], weight[:real_width], temperature, compute)
            own_maximum[rows] = x.amax(-1)
            sums[2, rows] = x.gather(1, local[rows, None]).squeeze(1) * is_local[rows]
            x -= own_maximum[rows, None]
            exp = x.exp()
            sums[0, rows] = exp.sum(-1)
            sums[1, rows] = exp.mul_(x).sum(-1)
        maximum = own_maximum.clone()
        if group.size() > 1:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
            shift = own_maximum - maximum
            # a rank with padding alone has no maximum, and nothing to add
            shift = torch.where(own_maximum.isfinite(), shift, 0.0)
            sums[1] = shift.exp() * (sums[1] + shift * sums[0])
            sums[0] *= shift.exp()
            dist.all_reduce(sums, group=group)
        log_sum, mean = sums[0].log(), sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, local, is_local, maximum, log_sum, mean)
        ctx.group, ctx.real_width, ctx.temperature = group, real_width, temperature
        return sums[2] - maximum - log_sum, log_sum - mean

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, weight, local, is_local, maximum, log_sum, mean = ctx.saved_tensors
        real, width = weight[: ctx.real_width], ctx.real_width
        grad_hidden = torch.zeros_like(hidden)
        # summed over chunks, so in more than the weight's precision
        grad_weight = torch.zeros_like(weight, dtype=log_sum.dtype)
        for rows in _chunks(hidden.size(0), width):
            x = _scaled_logits(hidden[rows], real, ctx.temperature, log_sum.dtype)
            x -= maximum[rows, None]
            p = (x - log_sum[rows, None]).exp_()
            x -= mean[rows, None]
            grad = p.mul_(x.mul_(-grad_entropy[rows, None]).sub_(grad_logprobs[rows, None]))
            own = (grad_logprobs[rows] * is_local[rows])[:, None]
            grad.scatter_add_(1, local[rows, None], own)
            grad = (grad / ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = grad @ real
            if grad_weight.dtype == hidden.dtype:
                grad_weight[:width].addmm_(grad.t(), hidden[rows])
            else:
                grad_weight[:width] += grad.t() @ hidden[rows]
        if ctx.group.size() > 1:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _scaled_logits(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    logits = (hidden @ weight.t()).to(dtype)
    return logits.div_(temperature) if temperature != 1.0 else logits


def _chunks(num_tokens: int, width: int) -> list[slice]:
    if not width:  # a rank whose share is padding alone
        return []
    chunk = max(1, CHUNK_ELEMENTS // width)
    return [slice(start, start + chunk) for start in range(0, num_tokens, chunk)]


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy of each distribution, both differentiable.

    Args:
        hidden: [R, H], the same on every rank; its gradient is summed over them.
        weight: [W, H], this rank's rows of the padded vocabulary.
        labels: [R] int64 in [0, vocab_size).
        tp_group: the ranks that hold the other rows, in vocabulary order.
        vocab_size: real size; padded rows behind it take no probability and get no gradient.
        temperature: logits are divided by it, as when sampling.

    Returns:
        logprobs [R] and entropy [R], in float32 (float64 for float64 hidden states).
    """
    width = weight.size(0)
    real_width = min(max(vocab_size - tp_group.rank() * width, 0), width)
    return _LinearLogprobs.apply(hidden, weight, labels, tp_group, real_width, temperature)
