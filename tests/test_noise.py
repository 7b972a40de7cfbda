"""Numbers for whole states: the published generator, their distribution, and where they lie."""

import pytest
import torch

from trm_fast import noise
from trm_fast.layers import truncated_normal_

WRAP = (1 << 64) - 1


def splitmix64(start, count):
    """The published generator, number by number, in Python's integers."""
    state, numbers = start & WRAP, []
    for _ in range(count):
        state = state + 0x9E3779B97F4A7C15 & WRAP
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & WRAP
        z = (z ^ z >> 27) * 0x94D049BB133111EB & WRAP
        numbers.append(z ^ z >> 31)
    return numbers


def test_the_reference_is_the_published_one():
    """Its known answers for the seed 1234567."""
    assert splitmix64(1234567, 3) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("start", [0, 1234567, (1 << 64) - 5])
@pytest.mark.parametrize("field", [0, 3])
def test_streams_are_splitmix64(start, field):
    words = torch.tensor([[start >> 32, start & 0xFFFFFFFF]])
    streams = noise.starts(words)
    skipped = start + field * (1 << 32) * 0x9E3779B97F4A7C15
    bits = [n >> 16 * part & 0xFFFF for n in splitmix64(skipped, 4) for part in range(4)]
    signed = torch.tensor([b - (1 << 16) if b >= 1 << 15 else b for b in bits])
    want = (signed + 32768.5) / 65536
    assert torch.equal(noise._uniform(streams, field, 16), want.float()[None])


def starts(rows):
    torch.manual_seed(0)
    return noise.starts(torch.randint(1 << 32, (rows, noise.WORDS)))


def quantiles(drawn):
    return drawn.flatten().double().quantile(torch.linspace(0.02, 0.98, 25).double())


def test_normal_numbers():
    drawn = noise.normal(starts(300), 1, torch.empty(300, 7, 51))
    want = torch.special.ndtri(torch.linspace(0.02, 0.98, 25, dtype=torch.float64))
    assert (quantiles(drawn) - want).abs().max() < 0.02
    assert 4 < drawn.abs().max() < 4.9 and float(drawn.std()) == pytest.approx(1, abs=0.01)
    flat = drawn.flatten(1)[:, :40].double()
    among = torch.corrcoef(flat.T).fill_diagonal_(0)  # places of a row, then rows at a place
    assert among.abs().max() < 5 / 300**0.5
    rows = torch.corrcoef(drawn.flatten(1)[:40].double()).fill_diagonal_(0)
    assert rows.abs().max() < 5 / 357**0.5


def test_truncated_normal_numbers_are_those_that_initial_states_are_drawn_from():
    drawn = noise.truncated_normal(starts(300), 0, torch.empty(300, 7, 51))
    torch.manual_seed(0)
    other = truncated_normal_(torch.empty(100_000), 1)
    assert (quantiles(drawn) - quantiles(other)).abs().max() < 0.02
    assert float(drawn.std()) == pytest.approx(1, abs=0.01)
    assert float(drawn.max()) == pytest.approx(float(other.max()), rel=1e-3)


@pytest.mark.parametrize("draw", [noise.normal, noise.truncated_normal])
def test_what_is_drawn_depends_on_row_field_and_place(draw):
    streams, like = starts(6), torch.empty(6, 5, 3, dtype=torch.float64)
    whole = draw(streams, 2, like)
    assert whole.dtype == torch.float64 and whole.shape == like.shape
    for rows in (slice(0, 2), slice(2, 6), slice(5, 6)):
        assert torch.equal(draw(streams[rows], 2, like[rows]), whole[rows])
    assert torch.equal(draw(streams, 2, like.transpose(0, 1).contiguous().transpose(0, 1)), whole)
    others = [draw(streams, 3, like), draw(streams.flip(0), 2, like)]
    assert all((other != whole).double().mean() > 0.99 for other in others)
