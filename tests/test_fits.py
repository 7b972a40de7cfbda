"""The table of what fits: at its edges, and the same in the docs."""

import json
from pathlib import Path

import pytest

from trm_fast import fits, info, memory
from trm_fast.ops import POLICIES

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("preset", fits.PRESETS)
@pytest.mark.parametrize("policy", POLICIES)
def test_one_board_more_does_not_fit(preset, policy):
    config = fits.config_of(preset)
    usable = fits.USABLE * 24 * memory.GIB
    boards = fits.most_boards(config, policy, usable)
    need = [memory.step_bytes(config, n, policy, fits.ENGINE) for n in (boards, boards + 1)]
    assert need[0] <= usable < need[1]


def test_nothing_fits_nothing():
    assert fits.most_boards(fits.config_of("maze-hard"), "save", 1000) == 0


def test_the_networks_are_the_official_ones():
    found = {name: fits.config_of(name) for name in fits.PRESETS}
    assert [c.total_len for c in found.values()] == [81, 97, 97, 916]
    assert [c.mlp_t for c in found.values()] == [True, True, False, False]
    assert [c.batch_size for c in found.values()] == [64, 768, 768, 768]


def test_the_table_shows_few_and_many(capsys):
    fit = fits.Fit(
        "a",
        "b",
        "save",
        "float32",
        8,
        dict(zip(fits.SIZES, (0, 1, 9999, 10001, 10**6), strict=True)),
    )
    assert fits.text([fit]).splitlines()[-1] == (
        "| `a` (b, float32, batch 8) | `save` | - | 1 | 9,999 | > 10,000 | > 10,000 |"
    )


def test_the_command(capsys):
    assert info.main(["--memory"]) == 0
    said = capsys.readouterr().out
    assert "computed" in said.splitlines()[0]
    assert fits.text(fits.table()) in said
    assert info.main(["--memory", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(fits.PRESETS) * len(POLICIES)
    assert rows[0]["boards"]["24"] == fits.table()[0].boards[24]


def test_the_docs_have_the_table():
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert fits.text(fits.table()) in text, "put what `trm-fast info --memory` prints there"
