"""HF checkpoint -> Megatron distributed checkpoint, which any layout loads.

    python tools/convert/hf_to_megatron.py Qwen/Qwen2.5-Math-7B qwen7b --dtype bf16 --verify

The sizes say for which layout the files are cut. Needs no GPU and little memory.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the library of this checkout

from megatron_zero.convert import hf_to_megatron
from megatron_zero.convert.command_line import run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf", metavar="HF_DIR_OR_ID", help="a folder or a hub id")
    parser.add_argument("out", metavar="OUT_DIR", help="must not exist")
    for kind in ("tensor", "pipeline", "expert"):
        parser.add_argument(f"--{kind}-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "keep"), default="keep")
    parser.add_argument("--drop-mtp", action="store_true", help="no multi-token prediction")
    parser.add_argument("--verify", action="store_true", help="read back and compare, and logits")
    parser.add_argument("--resume", action="store_true", help="continue what was interrupted")
    options = vars(parser.parse_args())
    return run(lambda: print(*hf_to_megatron(**options), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
