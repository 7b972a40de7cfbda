"""Taking new data and halting, against loops over single boards."""

import pytest
import torch
from parity import make_inputs

from trm_fast.recursion import halting, take_new_data


@pytest.mark.parametrize("halted", [[True] * 3, [False] * 3, [True, False, True], []], ids=str)
def test_take_new_data(halted):
    size = len(halted)
    current = {
        "inputs": torch.arange(size * 4, dtype=torch.int32).view(size, 4),
        "puzzle_identifiers": torch.arange(size, dtype=torch.int32),
        "weights": torch.arange(size * 6.0).view(size, 2, 3),
    }
    batch = {name: value + 100 for name, value in current.items()}
    taken = take_new_data(torch.tensor(halted, dtype=torch.bool), batch, current)
    assert list(taken) == list(current)
    for name, value in taken.items():
        assert value.dtype == current[name].dtype
        for i, new in enumerate(halted):
            assert torch.equal(value[i], (batch if new else current)[name][i])


def test_take_new_data_needs_every_key_that_is_carried():
    one = torch.zeros(1)
    with pytest.raises(KeyError, match="inputs"):
        take_new_data(torch.tensor([True]), {"labels": one}, {"inputs": one})
    extra = take_new_data(torch.tensor([True]), {"inputs": one, "more": one}, {"inputs": one})
    assert list(extra) == ["inputs"]


def scalar_halting(steps, q_halt, q_continue, max_steps, exploration, uniform, least):
    """The published rule for one board and its two draws."""
    wants_to = q_halt > (q_continue if q_continue is not None else 0.0)
    halted = steps >= max_steps or wants_to
    return halted and (uniform >= exploration or steps >= least)


@pytest.mark.parametrize("max_steps", [2, 5, 16])
@pytest.mark.parametrize("compared", [True, False], ids=["continue", "nocontinue"])
@pytest.mark.parametrize("exploration", [0.0, 0.4, 1.0])
def test_halting_against_a_loop(exploration, compared, max_steps):
    size = 400
    steps = torch.randint(1, max_steps + 1, (size,), dtype=torch.int32)
    q_halt, q_continue = make_inputs((size,), (size,))
    q_halt[::7] = 0.0  # not greater than 0
    against = q_continue if compared else None
    torch.manual_seed(4)
    got = halting(steps, q_halt, against, max_steps, exploration)
    after = torch.rand(())
    torch.manual_seed(4)
    uniform = torch.rand(size)
    least = torch.randint(2, max_steps + 1, (size,), dtype=torch.int32)
    assert torch.equal(torch.rand(()), after)  # those two draws and no other
    want = [
        scalar_halting(
            int(steps[i]),
            float(q_halt[i]),
            float(q_continue[i]) if compared else None,
            max_steps,
            exploration,
            float(uniform[i]),
            int(least[i]),
        )
        for i in range(size)
    ]
    assert got.dtype == torch.bool
    assert got.tolist() == want
    assert 0 < sum(want) < size  # the case decides something


def test_last_step_always_halts():
    """The least number of steps drawn is at most max_steps."""
    steps = torch.full((500,), 3, dtype=torch.int32)
    assert halting(steps, torch.full((500,), -1.0), None, 3, 1.0).all()


def test_no_board():
    steps = torch.zeros(0, dtype=torch.int32)
    assert halting(steps, torch.zeros(0), None, 4, 0.5).shape == (0,)
