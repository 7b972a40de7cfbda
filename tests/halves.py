"""The whole test suite in two processes, for machines with two cores: `make test` runs this.

The operations, and what starts processes of its own or takes long, run beside everything else; what
they said is shown behind the rest.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest"]
BESIDE = ["ops", "fuzz", "test_distributed.py", "test_distributed_run.py", "test_torchrun.py"]
BESIDE += ["test_export.py", "test_faults.py", "test_demo_page.py", "test_demo_server.py"]
BESIDE += ["test_demo_limits.py", "test_demo_rollouts.py", "test_train.py", "test_trainer.py"]


def main() -> int:
    """0 if all tests of both passed, else pytest's status of the first that has another."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        places = [str(Path("tests", name)) for name in BESIDE]
        beside = subprocess.Popen([*PYTEST, *places], stdout=said, stderr=subprocess.STDOUT)
        try:
            others = [f"--ignore={place}" for place in places]
            rest = subprocess.run([*PYTEST, *others], check=False).returncode
            status = beside.wait()
        finally:
            beside.kill()
            said.seek(0)
            sys.stdout.write(said.read())
    return rest or status


if __name__ == "__main__":
    sys.exit(main())
