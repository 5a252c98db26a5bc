"""Log-probabilities and entropy from logits that are split over the vocabulary.

Chunked over tokens, so that no float32 copy of the logits exists: of [R, V / tp] logits only the
gradient (same size, same dtype) is added.
"""

from typing import Any

import torch
import torch.distributed as dist

CHUNK_ELEMENTS = 2**22  # float32 values worked on at once: 16 MiB, large against a kernel launch


class _VocabParallelLogprobs(torch.autograd.Function):
    """Two all-reduces (the maximum; then three sums), each over [R] values.

    With x = logits / temperature and p = softmax(x): logprob = x_label - logsumexp(x),
    entropy = logsumexp(x) - E_p[x], and so
    d logprob / d x = 1[label] - p,   d entropy / d x = -p (x - E_p[x]).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        first: int,
        group: dist.ProcessGroup,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, width = logits.shape
        compute = torch.promote_types(logits.dtype, torch.float32)
        local = labels - first
        is_local = (local >= 0) & (local < width)
        local = local.clamp(0, max(width - 1, 0))
        maximum = torch.full((num_tokens,), -torch.inf, dtype=compute, device=logits.device)
        for rows in _chunks(logits):
            if width:
                maximum[rows] = logits[rows].amax(-1).to(compute) / temperature
        if group.size() > 1:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        sums = torch.zeros(3, num_tokens, dtype=compute, device=logits.device)
        for rows in _chunks(logits):
            x = logits[rows].to(compute) / temperature - maximum[rows, None]
            exp = x.exp()
            sums[0, rows] = exp.sum(-1)
            sums[1, rows] = (exp * x).sum(-1)
            if width:
                sums[2, rows] = x.gather(1, local[rows, None]).squeeze(1) * is_local[rows]
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        log_sum, mean = sums[0].log(), sums[1] / sums[0]
        ctx.save_for_backward(logits, local, is_local, maximum, log_sum, mean)
        ctx.temperature = temperature
        return sums[2] - log_sum, log_sum - mean

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad_logprobs, grad_entropy = grads
        logits, local, is_local, maximum, log_sum, mean = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _chunks(logits):
            x = logits[rows].to(log_sum.dtype) / ctx.temperature - maximum[rows, None]
            p = (x - log_sum[rows, None]).exp()
            grad = p * (
                -grad_logprobs[rows, None] - grad_entropy[rows, None] * (x - mean[rows, None])
            )
            if grad.size(1):
                own = (grad_logprobs[rows] * is_local[rows])[:, None]
                grad.scatter_add_(1, local[rows, None], own)
            grad_logits[rows] = (grad / ctx.temperature).to(logits.dtype)
        return grad_logits, None, None, None, None


def _chunks(logits: torch.Tensor) -> list[slice]:
    num_tokens, width = logits.shape
    chunk = max(1, CHUNK_ELEMENTS // max(width, 1))
    return [slice(start, start + chunk) for start in range(0, num_tokens, chunk)]


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy of each distribution, both differentiable.

    Args:
        logits: [R, W], this rank's slice of the padded vocabulary.
        labels: [R] int64 in [0, vocab_size).
        tp_group: the ranks that hold the other slices, in vocabulary order.
        vocab_size: real size; padded columns behind it take no probability.
        temperature: logits are divided by it, as when sampling.

    Returns:
        logprobs [R] and entropy [R], in float32 (float64 for float64 logits).
    """
    width = logits.size(1)
    first = tp_group.rank() * width
    real_width = min(max(vocab_size - first, 0), width)
    return _VocabParallelLogprobs.apply(
        logits[:, :real_width], labels, first, tp_group, temperature
    )
