"""`python -m trm_fast.train [key=value ...]`: train a model; nothing given, the default job.

Owns the command line only, and answers `--help` and mistakes before PyTorch is loaded. Imported by
`__main__.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from trm_fast.console import as_log, say, show_builds
from trm_fast.overrides import HelpRequested, help_text, parse_train

__all__ = ["main"]


@as_log()
def main(argv: Sequence[str] | None = None) -> int:
    """Run a training job; `argv` without the program name (default: the process's own).

    Returns:
        0 at the end of the run, 1 where it had to stop, 2 for a mistake in settings or data,
        130 and 143 after SIGINT and SIGTERM (with a checkpoint saved).
    """
    try:
        config = parse_train(sys.argv[1:] if argv is None else argv)
    except HelpRequested:
        say(help_text())
        return 0
    except ValueError as error:
        say(f"trm-fast train: {error}", err=True)
        return 2
    # Read by the OpenMP runtime when PyTorch loads it: threads that wait for work sleep instead of
    # spinning. With a busy neighbour a step is several times faster, without one as fast.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    show_builds()
    try:
        from trm_fast.runner import train

        return train(config)
    except KeyboardInterrupt:  # while PyTorch was being loaded
        say("interrupted", err=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
