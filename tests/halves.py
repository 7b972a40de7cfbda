"""The whole test suite in two processes, for machines with two cores: `make test` runs this.

The operations (tests/ops) run beside everything else; what they said is shown behind the rest.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest"]


def main() -> int:
    """0 if all tests of both passed, else pytest's status of the first that has another."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        beside = subprocess.Popen(
            [*PYTEST, str(Path("tests/ops"))], stdout=said, stderr=subprocess.STDOUT
        )
        try:
            rest = subprocess.run([*PYTEST, "--ignore=tests/ops"], check=False).returncode
            status = beside.wait()
        finally:
            beside.kill()
            said.seek(0)
            sys.stdout.write(said.read())
    return rest or status


if __name__ == "__main__":
    sys.exit(main())
