"""Do two HF checkpoints hold the same tensors, bit by bit?

    python tools/convert/check_roundtrip.py HF_DIR OTHER_HF_DIR

Exit status 0: identical; 1: the first difference is named; 2: one of them cannot be read.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the library of this checkout

from megatron_zero.convert import first_difference
from megatron_zero.convert.command_line import run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf", metavar="HF_DIR")
    parser.add_argument("other", metavar="OTHER_HF_DIR")
    options = vars(parser.parse_args())

    def compare() -> int:
        difference = first_difference(**options)
        print(difference or "identical")
        return 1 if difference else 0

    return run(compare)


if __name__ == "__main__":
    sys.exit(main())
