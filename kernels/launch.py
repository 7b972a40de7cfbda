"""Launch settings as data: kernel, architecture, width of the numbers, sizes -> tiles.

Owns `ROWS` and `pick`. Tuning means changing a row here and writing beside it what was measured,
where and when; `python -m trm_fast.kernels.report` shows what the compiler makes of each row.
Imported by the op modules and by `report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trm_fast.kernels._runtime import architecture


@dataclass(frozen=True)
class Row:
    """Settings of one kernel on one family of GPUs.

    Attributes:
        kernel: "<op>_fwd", "<op>_bwd" or what else an op module picks it by.
        arch: 80 (sm_8x), 90 or 100 (sm_10x).
        bits: width of the numbers: 8 (e4m3), 16 (bfloat16, float16) or 32 (float32). Of sm_8x
            only sm_89 has e4m3.
        tiles: the kernel's block sizes.
        num_warps, num_stages: of the launch.
        at_most: sizes up to which the row serves; of a kernel's rows the first that serves is
            taken, so rows with limits come before those without.
        measured: GPU, date and time; empty where nobody has measured yet.
    """

    kernel: str
    arch: int
    bits: int
    tiles: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3
    at_most: Mapping[str, int] = field(default_factory=dict)
    measured: str = ""


def _rows(kernel: str, *table: tuple[Any, ...]) -> tuple[Row, ...]:
    return tuple(Row(kernel, *entry) for entry in table)


def _tiles(m: int, n: int, k: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}


# Columns: arch, bits, tiles, num_warps, num_stages[, at_most[, measured]]. Tiles for sm_80 stay
# below the 99 KiB of shared memory that a block has on the consumer cards of that family.
ROWS: tuple[Row, ...] = (
    # residual_rmsnorm: rows of up to 1024 features, one pass over memory.
    *_rows(
        "residual_rmsnorm",
        *((arch, bits, {"BLOCK_M": 8}, 8, 1) for arch in (80, 90, 100) for bits in (16, 32)),
    ),
    # The same along the tokens: a program has some columns of one item, a cache line per token.
    *_rows(
        "residual_rmsnorm_tokens",
        *(
            (arch, bits, {"BLOCK_S": 128, "BLOCK_D": 1024 // bits}, 8, 1)
            for arch in (80, 90, 100)
            for bits in (16, 32)
        ),
    ),
    # inject and swiglu: elementwise, eight numbers of 16 bits or more per thread.
    *_rows(
        "inject",
        *((arch, bits, {"BLOCK": 2048}, 8, 1) for arch in (80, 90, 100) for bits in (16, 32)),
    ),
    *_rows(
        "swiglu",
        *(
            (arch, bits, {"BLOCK_M": 8, "BLOCK_N": 256}, 8, 1)
            for arch in (80, 90, 100)
            for bits in (16, 32)
        ),
    ),
    # embed_reset: whole rows of x, y and z; sums over chunks of tokens for the embedding.
    *_rows(
        "embed_reset",
        *((arch, bits, {"BLOCK_M": 8}, 8, 1) for arch in (80, 90, 100) for bits in (16, 32)),
    ),
    *_rows(
        "embed_reset_bwd",
        (80, 16, {"BLOCK_D": 128, "BLOCK_K": 64, "CHUNK": 1024}, 8, 3),
        (90, 16, {"BLOCK_D": 128, "BLOCK_K": 64, "CHUNK": 1024}, 4, 3),
        (100, 16, {"BLOCK_D": 128, "BLOCK_K": 64, "CHUNK": 1024}, 4, 3),
        *(
            (arch, 32, {"BLOCK_D": 64, "BLOCK_K": 32, "CHUNK": 1024}, 8, 2)
            for arch in (80, 90, 100)
        ),
    ),
    # stablemax_loss: whole rows of logits, some thousand numbers in a tile.
    *_rows(
        "stablemax_loss",
        *(
            (arch, bits, {"BLOCK_M": rows}, 4, 1, {"V": widest})
            for arch in (80, 90, 100)
            for bits in (16, 32)
            for widest, rows in ((16, 128), (128, 16), (1024, 2))
        ),
    ),
    # adam_atan2_ema_: elementwise over one tensor, five of them read.
    *_rows(
        "adam_atan2_ema_",
        *((arch, bits, {"BLOCK": 1024}, 8, 1) for arch in (80, 90, 100) for bits in (16, 32)),
    ),
    # linear_rmsnorm: a @ w (+ residual) of either orientation of w, partial sums of squares.
    # Of e4m3, BLOCK_K is the E4M3_TILE, and a second accumulator takes the sums of one tile.
    *_rows(
        "linear",
        (80, 8, _tiles(128, 64, 128), 8, 3),
        (90, 8, _tiles(128, 128, 128), 8, 3),
        (100, 8, _tiles(128, 128, 128), 8, 3),
        (80, 16, _tiles(128, 128, 32), 8, 3),
        (90, 16, _tiles(128, 256, 64), 8, 3),
        (100, 16, _tiles(128, 256, 64), 8, 3),
        (90, 32, _tiles(64, 32, 32), 8, 2),
        *((arch, 32, _tiles(64, 64, 32), 8, 2) for arch in (80, 100)),
    ),
    # swiglu_rmsnorm: gate and up in two accumulators, and the backward through SwiGLU. Of e4m3,
    # BLOCK_N is the E4M3_TILE; the steps of its columns spill beside 128 rows on sm_100.
    *_rows(
        "gate_up",
        (80, 8, _tiles(64, 128, 128), 8, 2),
        (90, 8, _tiles(128, 128, 128), 8, 3),
        (100, 8, _tiles(64, 128, 128), 8, 3),
        (80, 16, _tiles(128, 64, 32), 8, 3),
        (90, 16, _tiles(128, 128, 64), 8, 3),
        (100, 16, _tiles(128, 128, 64), 8, 3),
        *((arch, 32, _tiles(64, 32, 32), 8, 2) for arch in (80, 90, 100)),
    ),
    *_rows(
        "swiglu_bwd",
        (80, 16, _tiles(128, 64, 32), 8, 3),
        (90, 16, _tiles(128, 64, 64), 8, 3),
        (100, 16, _tiles(128, 64, 64), 8, 3),
        *((arch, 32, _tiles(64, 32, 32), 8, 2) for arch in (80, 90, 100)),
    ),
    # token_mix: gate and up in one accumulator of 2 * BLOCK_F columns. SPLIT: the tokens in pieces,
    # 97 as 64 + 32 + 16, an eighth less to multiply than 128; 0: in one tile, where pieces spill
    # (sm_80) or make twice as many instructions of the tensor cores (sm_100).
    *_rows(
        "token_mix_fwd",
        (80, 16, {"BLOCK_D": 64, "BLOCK_F": 32, "SPLIT": 0}, 8, 2),
        (90, 16, {"BLOCK_D": 128, "BLOCK_F": 32, "SPLIT": 1}, 8, 3, {"S": 112}),
        (90, 16, {"BLOCK_D": 128, "BLOCK_F": 32, "SPLIT": 0}, 8, 3),
        (100, 16, {"BLOCK_D": 128, "BLOCK_F": 32, "SPLIT": 0}, 8, 3),
        *((a, 32, {"BLOCK_D": 32, "BLOCK_F": 16, "SPLIT": 1}, 8, 2) for a in (80, 90, 100)),
    ),
    *_rows(
        "token_mix_bwd",
        (80, 16, {"BLOCK_D": 64, "BLOCK_F": 32, "SPLIT": 0}, 8, 2),
        (90, 16, {"BLOCK_D": 128, "BLOCK_F": 32, "SPLIT": 1}, 8, 3),
        (100, 16, {"BLOCK_D": 128, "BLOCK_F": 32, "SPLIT": 0}, 8, 2),
        *((a, 32, {"BLOCK_D": 32, "BLOCK_F": 16, "SPLIT": 1}, 8, 2) for a in (80, 90, 100)),
    ),
    # The same beyond 128 tokens: hidden layer, its backward, and the product with the tokens.
    *_rows(
        "token_mix_hidden",
        (80, 16, {"BLOCK_D": 128, "BLOCK_F": 64, "BLOCK_S": 32}, 8, 3),
        (90, 16, {"BLOCK_D": 128, "BLOCK_F": 128, "BLOCK_S": 64}, 8, 3),
        (100, 16, {"BLOCK_D": 128, "BLOCK_F": 128, "BLOCK_S": 64}, 8, 3),
        *((a, 32, {"BLOCK_D": 64, "BLOCK_F": 32, "BLOCK_S": 32}, 8, 2) for a in (80, 90, 100)),
    ),
    *_rows(
        "token_mix_hidden_bwd",
        (80, 16, {"BLOCK_D": 64, "BLOCK_F": 64, "BLOCK_S": 32}, 8, 3),
        (90, 16, {"BLOCK_D": 128, "BLOCK_F": 64, "BLOCK_S": 64}, 8, 3),
        (100, 16, {"BLOCK_D": 128, "BLOCK_F": 64, "BLOCK_S": 64}, 8, 3),
        *((a, 32, {"BLOCK_D": 64, "BLOCK_F": 16, "BLOCK_S": 32}, 8, 2) for a in (80, 90, 100)),
    ),
    *_rows(
        "token_mix_tokens",
        (80, 16, _tiles(128, 128, 32), 8, 3),
        (90, 16, _tiles(128, 256, 64), 8, 3),
        (100, 16, _tiles(128, 128, 64), 8, 3),
        (90, 32, _tiles(64, 32, 32), 8, 2),
        *((arch, 32, _tiles(64, 64, 32), 8, 2) for arch in (80, 100)),
    ),
    # rope_attention: a head's whole sequence is the tile. Wgmma wants 64 rows, mma.sync fewer.
    *_rows(
        "rope_attention_fwd",
        *((80, 16, {"BLOCK_S": size}, 4, 1, {"S": size}) for size in (16, 32, 64)),
        *((arch, 16, {"BLOCK_S": 64}, 4, 1, {"S": 64}) for arch in (90, 100)),
        *((arch, 16, {"BLOCK_S": 128}, 8, 1, {"S": 128}) for arch in (80, 90, 100)),
    ),
    *_rows(
        "rope_attention_bwd",
        *((80, 16, {"BLOCK_S": size}, 4, 1, {"S": size}) for size in (16, 32, 64)),
        (90, 16, {"BLOCK_S": 64}, 4, 1, {"S": 64}),
        (100, 16, {"BLOCK_S": 64}, 8, 1, {"S": 64}),
        *((arch, 16, {"BLOCK_S": 128}, 8, 1, {"S": 128}) for arch in (80, 90, 100)),
    ),
    # The rotation on its own, in front of PyTorch's attention: every head of some rows.
    *_rows(
        "rope",
        *((arch, bits, {"BLOCK_M": 16}, 8, 1) for arch in (80, 90, 100) for bits in (16, 32)),
    ),
)


_indexed: tuple[tuple[Row, ...], dict[tuple[str, int, int], list[Row]]] = ((), {})


def _index() -> dict[tuple[str, int, int], list[Row]]:
    """ROWS by kernel, arch and bits, made anew when they were replaced."""
    global _indexed
    if _indexed[0] is not ROWS:
        found: dict[tuple[str, int, int], list[Row]] = {}
        for row in ROWS:
            found.setdefault((row.kernel, row.arch, row.bits), []).append(row)
        _indexed = (ROWS, found)
    return _indexed[1]


def pick(kernel: str, like: Tensor, **sizes: int) -> Row:
    """The first row for this kernel, the device and dtype of `like`, and the sizes."""
    arch, bits = architecture(like.device), like.element_size() * 8
    for row in _index().get((kernel, arch, bits), ()):
        if all(sizes[name] <= limit for name, limit in row.at_most.items()):
            return row
    raise AssertionError(f"no launch row for {kernel} on sm_{arch}, {bits} bits, {sizes}")
