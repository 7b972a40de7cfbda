"""Counter-based random numbers: known answers, independence of the place they are drawn at."""

import pytest
import torch

from trm_fast.philox import Draws, integers, permutations, philox, uniform

# Published with the generator (Random123's known-answer tests): counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    found = philox(tuple(torch.tensor(c) for c in counter), tuple(key))
    assert [int(word) for word in found] == words


def words(count, purpose=1, seed=5, step=3, rows=range(8), **others):
    counts = {purpose: count} | {int(name[1:]): n for name, n in others.items()}
    return Draws(seed, torch.tensor(step), torch.tensor(list(rows)), counts).words(purpose)


def test_a_number_depends_on_its_place_alone():
    whole = words(10)
    assert torch.equal(whole[:, :3], words(3))
    assert torch.equal(whole[4:], words(10, rows=range(4, 8)))
    assert torch.equal(whole, words(10, _0=7, _2=3)), "whatever else is drawn"
    places = [{"seed": 6}, {"step": 4}, {"seed": 5 + 2**32}, {"rows": range(8, 16)}, {"purpose": 2}]
    for place in places:
        assert not (whole == words(10, **place)).any()


def test_uniform_numbers():
    drawn = uniform(words(25, rows=range(4000)))
    assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert abs(float(drawn.double().mean()) - 0.5) < 5 / (12 * 1e5) ** 0.5
    pairs = drawn[:, :2].double()
    assert abs(float(torch.corrcoef(pairs.T)[0, 1])) < 5 / 4000**0.5
    counts = (drawn * 16).long().flatten().bincount(minlength=16)
    assert float(((counts - 6250) ** 2 / 6250).sum()) < 50  # chi-squared of 15 degrees


def test_integers():
    drawn = integers(words(1, rows=range(20000)), 2, 17)
    counts = drawn.flatten().bincount(minlength=17)
    assert counts[:2].sum() == 0 and len(counts) == 17
    assert abs(counts[2:] - 20000 / 15).max() < 5 * (20000 / 15) ** 0.5


def test_permutations():
    drawn = permutations(words(18, rows=range(3000)).view(3000, 2, 9))
    assert drawn.shape == (3000, 2, 9)
    assert torch.equal(drawn.sort(-1).values, torch.arange(9).expand(3000, 2, 9))
    for place in range(9):
        counts = drawn[:, :, place].flatten().bincount(minlength=9)
        assert abs(counts - 6000 / 9).max() < 5 * (6000 / 9) ** 0.5
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
