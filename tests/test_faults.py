"""The short form of `tools/faults.py`: a tiny run is killed, starved and damaged, and goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /dev/full")
def test_no_fault_loses_anything(tmp_path):
    table = tmp_path / "table.json"
    command = [sys.executable, str(ROOT / "tools" / "faults.py"), "--short", "--json", str(table)]
    environment = {**os.environ, "TRM_FAST_EXT": "off", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(table.read_text())
    assert len(rows) >= 9, "those that need no mounted file systems, at the least"
    for row in rows:
        assert row["tried"] == row["survived"] > 0 and row["lost"] == 0, row
    assert not [path for path in tmp_path.iterdir() if path != table]
