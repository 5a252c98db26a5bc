"""Two runs in one process that nothing launched, as in a notebook; run by test_alone.py."""

import os
import sys

from megatron_zero.config_io import apply_overrides
from megatron_zero.launch_args import JOB_VARIABLES
from megatron_zero.pretrain import pretrain
from recipes.small import quickstart_base


def main() -> None:
    for name in ("first", "second"):
        overrides = [f"runs_dir={sys.argv[1]}", f"name={name}", "num_steps=2"]
        pretrain(apply_overrides(quickstart_base(), overrides))
        assert not set(JOB_VARIABLES) & os.environ.keys()
    overrides += ["name=third", "documents.source=none.txt"]
    try:
        pretrain(apply_overrides(quickstart_base(), overrides))
    except ValueError as error:
        print(f"REFUSED {error}")


if __name__ == "__main__":
    main()
