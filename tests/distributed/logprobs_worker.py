"""Under torchrun: `linear_logprobs` over all ranks; rank 0 writes values and gradients.

    logprobs_worker.py OUT.pt DTYPE

The vocabulary of 5 is padded to 2 rows a rank: with four ranks the third has one row of padding and
the fourth nothing else.
"""

import sys

import torch
import torch.distributed as dist

from megatron_zero.policy import logprobs

VOCAB, HIDDEN, TOKENS, TEMPERATURE = 5, 6, 7, 0.7


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, labels, and the weights of logprobs and entropies in the loss."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    weight = 3 * torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 4])
    a, b = torch.randn(2, TOKENS, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), labels, a, b


def main() -> None:
    out, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    logprobs.CHUNK_ELEMENTS = 4  # two tokens at a time, or four, or one
    hidden, weight, labels, a, b = inputs(dtype)
    padded = torch.zeros(2 * size if size > 1 else VOCAB + 1, HIDDEN, dtype=dtype)
    padded[:VOCAB] = weight
    if rank == size - 1:
        padded[VOCAB:] = 100.0  # padding must count for nothing
    own = padded.chunk(size)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    values, entropy = logprobs.linear_logprobs(
        hidden, own, labels, tp_group=dist.group.WORLD, vocab_size=VOCAB, temperature=TEMPERATURE
    )
    (a * values + b * entropy).sum().backward()
    grads = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(grads, own.grad)
    if rank == 0:
        torch.save((values.detach(), entropy.detach(), hidden.grad, torch.cat(grads)), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
