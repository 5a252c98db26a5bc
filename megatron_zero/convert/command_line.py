"""What the programs in `tools/convert` share: how they say what went wrong."""

import sys
from collections.abc import Callable
from typing import Optional

from megatron_zero.convert.verify import VerificationError


def run(action: Callable[[], Optional[int]]) -> int:
    """Do it; the exit status: 0, 1 what failed on the way, 2 bad input, 130 interrupted."""
    try:
        return action() or 0
    except KeyboardInterrupt:
        print("interrupted: --resume continues", file=sys.stderr)
        return 130
    except (ValueError, VerificationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        where = f" {error.filename}:" if error.filename else ""
        print(f"error:{where} {error.strerror or error}; not finished", file=sys.stderr)
        return 1
