"""Which configuration, with which policy, trains on a GPU of how much memory, and at what batch.

Owns the table of `trm-fast info --memory`. Everything in it is computed from what the recursion
keeps (`memory.py`), nothing measured. Imported by `info.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trm_fast import memory
from trm_fast.config import ModelConfig, from_preset
from trm_fast.ops import POLICIES

SIZES = (6, 8, 12, 24, 80)  # GiB
# Of a GPU's memory; the rest is for its driver, for libraries and for what lies unused between
# tensors.
USABLE = 0.9
ENGINE = "triton"
MOST_SHOWN = 10_000
# preset -> what it is, tokens of a board, token values
PRESETS = {
    "sudoku-mini": ("default job", 81, 11),
    "sudoku-extreme": ("official Sudoku, mlp_t", 81, 11),
    "sudoku-extreme-attention": ("official Sudoku, attention", 81, 11),
    "maze-hard": ("official Maze, 916 tokens", 900, 6),
}


@dataclass(frozen=True)
class Fit:
    """The most boards of one training step, by GiB of the GPU; 0 where not even one fits.

    Attributes:
        preset, about, policy: what is trained, and with which of `POLICIES`.
        dtype: of the forward pass.  official: the preset's own batch size.
        boards: GiB -> boards.
    """

    preset: str
    about: str
    policy: str
    dtype: str
    official: int
    boards: dict[int, int]


def config_of(preset: str) -> ModelConfig:
    """A preset's network, on the data it is meant for."""
    settings = from_preset(preset)
    _, tokens, vocabulary = PRESETS[preset]
    return settings.arch.model_config(
        batch_size=settings.global_batch_size,
        seq_len=tokens,
        vocab_size=vocabulary,
        num_puzzle_identifiers=1,
    )


def most_boards(config: ModelConfig, policy: str, usable: float) -> int:
    """The largest batch whose training step needs at most `usable` bytes."""
    fixed = memory.step_bytes(config, 0, policy, ENGINE)
    board = memory.step_bytes(config, 1, policy, ENGINE) - fixed
    return max(0, int((usable - fixed) // board))


def table() -> list[Fit]:
    """Every preset of `PRESETS` with every policy."""
    found = []
    for preset, (about, _, _) in PRESETS.items():
        config = config_of(preset)
        for policy in POLICIES:
            boards = {
                size: most_boards(config, policy, USABLE * size * memory.GIB) for size in SIZES
            }
            found.append(
                Fit(preset, about, policy, config.forward_dtype, config.batch_size, boards)
            )
    return found


def to_json(fits: list[Fit]) -> list[dict]:
    """Ready for JSON."""
    return [asdict(fit) for fit in fits]


def text(fits: list[Fit]) -> str:
    """A table in Markdown: the most boards of a step by memory of the GPU."""
    head = ["configuration", "`arch.policy`", *(f"{size} GB" for size in SIZES)]
    lines = [_line(head), _line(["---"] * len(head))]
    for fit in fits:
        about = f"`{fit.preset}` ({fit.about}, {fit.dtype}, batch {fit.official})"
        cells = [_count(n) for n in fit.boards.values()]
        first = fit.policy == POLICIES[0]
        lines.append(_line([about if first else "", f"`{fit.policy}`", *cells]))
    return "\n".join(lines)


def _count(boards: int) -> str:
    if boards > MOST_SHOWN:
        return f"> {MOST_SHOWN:,}"
    return f"{boards:,}" if boards else "-"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
