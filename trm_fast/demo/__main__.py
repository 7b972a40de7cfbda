"""`python -m trm_fast.demo`, the same as `trm-fast demo`. Imported by nobody."""

import sys

from trm_fast.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
