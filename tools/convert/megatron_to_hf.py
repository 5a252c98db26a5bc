"""Megatron distributed checkpoint -> HF checkpoint; a run's training checkpoint too.

    python tools/convert/megatron_to_hf.py runs/x/checkpoints/step_000010 exported --dtype bf16

Of a run with one checkpoint its directory, runs/x, will do. Files are divided as in the original
where that is known, unless --max-shard-size says otherwise.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the library of this checkout

from megatron_zero.convert import megatron_to_hf
from megatron_zero.convert.command_line import run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("megatron", metavar="MEGATRON_DIR", help="from any layout, or a run")
    parser.add_argument("out", metavar="OUT_DIR", help="must not exist")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "keep"), default="keep")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB or 500MB")
    parser.add_argument("--hf-config", metavar="DIR_OR_ID", help="config and tokenizer, if apart")
    parser.add_argument("--verify", action="store_true", help="read back and compare, and logits")
    parser.add_argument("--resume", action="store_true", help="continue what was interrupted")
    options = vars(parser.parse_args())
    return run(lambda: print(*megatron_to_hf(**options), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
