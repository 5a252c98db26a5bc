"""Generated addition problems: a complete task without any download.

The quickstart pretrains a small model on `document`s and then trains it on `problem`s with
Dr. GRPO. Documents are worked solutions of varying length (0 to 2 repeats of a check that adds
nothing), and a fraction of them end in a wrong answer: the base model is right often enough to be
rewarded, wrong often enough to learn, and its length is free to drift, which is the length bias
that the paper is about.

Everything is a pure function of (seed, index, config): no state, the same on every rank.

Held out: about one pair of operands in ten, chosen by a hash of the unordered pair, so 12+34 and
34+12 are on the same side. The rule does not depend on seed or range, so no problem of the
evaluation set is in any training set or document, whatever the run's settings.

`build_character_tokenizer` makes the tokenizer that goes with it (`model.tokenizer="characters"`).
"""

import random
from typing import TYPE_CHECKING

from megatron_zero.config import ArithmeticConfig, fail
from megatron_zero.data.seeding import below, seeded_random, stable_hash
from megatron_zero.data.templates import apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_TRAIN_ROWS = 8192  # rows of the data set "arithmetic" when their number is not limited
NUM_HELD_OUT_ROWS = 256

_HELD_OUT_ONE_IN = 10
_MAX_DRAWS = 1000  # of one training problem: 0.1 ** 1000 says that the range holds none
_MAX_HELD_OUT_DRAWS = 100_000
_NUM_CHECKS = (0, 0, 1, 2)
_WRONG_BY = (-10, 10, 1, -1, 2)

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
CHARACTERS = "\n" + "".join(chr(code) for code in range(ord(" "), ord("~") + 1))


def is_held_out(a: int, b: int) -> bool:
    """Whether a+b is an evaluation problem; the same for b+a."""
    return stable_hash("arithmetic held out", min(a, b), max(a, b)) % _HELD_OUT_ONE_IN == 0


def _question(a: int, b: int) -> str:
    return f"What is {a}+{b}?"


def _draw(rng: random.Random, config: ArithmeticConfig) -> tuple[int, int]:
    span = config.max_operand - config.min_operand + 1
    return config.min_operand + below(rng, span), config.min_operand + below(rng, span)


def _operands(seed: int, index: int, config: ArithmeticConfig) -> tuple[int, int]:
    rng = seeded_random("arithmetic problem", seed, index)
    for _ in range(_MAX_DRAWS):
        if not is_held_out(*(pair := _draw(rng, config))):
            return pair
    valid = f"every pair from {config.min_operand} on is held out for evaluation"
    fail("arithmetic.max_operand", config.max_operand, f"{valid}: use a wider range")


def problem(seed: int, index: int, config: ArithmeticConfig) -> tuple[str, str]:
    """Training problem number `index`: (question, answer). Indices are endless.

    Example:
        problem(0, 5, ArithmeticConfig()) -> ("What is 12+34?", "46")

    Raises:
        ValueError: the range of operands is so small that all of it is held out.
    """
    a, b = _operands(seed, index, config)
    return _question(a, b), str(a + b)


def solution(seed: int, index: int, config: ArithmeticConfig) -> str:
    """Worked solution of `problem(seed, index, config)`; its final answer is sometimes wrong.

    The steps are always right and never hold the whole sum, so that the answer is decided by its
    own tokens. Whether it is wrong is independent of the solution's length.

    Example (12+34):
        "2+4=6. 10+30=40. check 40+6. \\boxed{46}"

    Raises:
        ValueError: as `problem`.
    """
    a, b = _operands(seed, index, config)
    rng = seeded_random("arithmetic solution", seed, index)
    ones_a, ones_b = a % 10, b % 10
    ones, rest = ones_a + ones_b, (a - ones_a) + (b - ones_b)
    steps = [f"{ones_a}+{ones_b}={ones}.", f"{a - ones_a}+{b - ones_b}={rest}."]
    steps += [f"check {rest}+{ones}."] * _NUM_CHECKS[below(rng, len(_NUM_CHECKS))]
    answer = a + b
    if rng.random() < config.wrong_fraction:
        answer += _WRONG_BY[below(rng, len(_WRONG_BY))]
    return f"{' '.join(steps)} \\boxed{{{answer}}}"


def document(seed: int, index: int, config: ArithmeticConfig) -> str:
    """What pretraining reads: templated question and solution, without EOS.

    Raises:
        ValueError: as `problem`.
    """
    question, _ = problem(seed, index, config)
    return apply_template("arithmetic", question) + solution(seed, index, config)


def held_out_problems(config: ArithmeticConfig) -> list[tuple[str, str]]:
    """The evaluation set: up to `NUM_HELD_OUT_ROWS` different problems, fixed by the range alone.

    A small range may hold fewer.

    Raises:
        ValueError: no pair of the range is held out.
    """
    rng = seeded_random("arithmetic evaluation")
    span = config.max_operand - config.min_operand + 1
    chosen: dict[tuple[int, int], None] = {}  # a set that keeps its order
    for _ in range(min(_MAX_HELD_OUT_DRAWS, 100 * span * span)):
        if is_held_out(*(pair := _draw(rng, config))):
            chosen[pair] = None
        if len(chosen) == NUM_HELD_OUT_ROWS:
            break
    if not chosen:
        valid = f"no pair from {config.min_operand} on is held out for evaluation"
        fail("arithmetic.max_operand", config.max_operand, f"{valid}: use a wider range")
    return [(_question(a, b), str(a + b)) for a, b in chosen]


def build_character_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per printable ASCII character and newline: 99 ids, 3 of them special.

    `<pad>` is 0, `<eos>` 1, `<unk>` 2 (each byte of any other character); no BOS. Text of known
    characters survives encode and decode exactly. Save it with `save_pretrained`.

    The vocabulary is written the byte-level way (space is `\u0120`, newline `\u010a`) because of
    who reads the folder: next to the `config.json` of a Qwen2 model, `AutoTokenizer`, and so vLLM,
    ignores the saved class and pipeline, keeps vocabulary and merges, and reads them byte-level.
    With plain characters it would drop every space. (There, other characters are dropped instead
    of giving `<unk>`.)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = {" ": "\u0120", "\n": "\u010a"}
    vocab = {"<pad>": PAD_ID, "<eos>": EOS_ID, "<unk>": UNK_ID}
    for character in CHARACTERS:
        vocab[byte_level.get(character, character)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
