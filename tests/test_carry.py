"""What the model hands from one supervision step to the next: states, data, halting, its target.

tests/test_recursion.py checks the rules alone; here the model follows them over several steps.
"""

import copy

import pytest
import torch
from tiny import MIXERS, assert_equal, gradients, step, tiny_batch, tiny_model

BOTH = pytest.mark.parametrize("mixer", MIXERS)


@BOTH
def test_a_step_is_reset_recursion_and_readout(mixer):
    """Three steps of the model against the parts: boards that halted start from H_init, L_init."""
    model = tiny_model(halt_max_steps=2, **MIXERS[mixer]).eval()
    carry = model.initial_carry(tiny_batch())
    assert carry.halted.all()
    assert carry.steps.tolist() == [0] * 4
    states, data = None, None
    for number in (1, 2, 3):
        batch = tiny_batch(seed=number)
        carry, outputs = step(model, batch, carry)
        fresh = number in (1, 3)
        data = batch if fresh else data
        start = model.inner.empty_carry(4) if fresh else states
        halted = torch.full((4,), fresh)
        states, logits, (q_halt, q_continue) = model.inner(start, data, halted)
        assert torch.equal(carry.inner_carry.z_H, states.z_H)
        assert torch.equal(carry.inner_carry.z_L, states.z_L)
        assert torch.equal(outputs["logits"], logits)
        assert torch.equal(outputs["q_halt_logits"], q_halt)
        assert torch.equal(outputs["q_continue_logits"], q_continue)
        assert_equal(carry.current_data, data)
        assert carry.steps.tolist() == [2 if number == 2 else 1] * 4
        assert carry.halted.tolist() == [number == 2] * 4
        assert not carry.inner_carry.z_H.requires_grad
        assert not carry.inner_carry.z_L.requires_grad


def test_reset_carry():
    model = tiny_model()
    state = model.inner.empty_carry(3)
    flags = torch.tensor([True, False, True])
    state.z_H[1], state.z_L[1] = 1.0, 2.0
    reset = model.inner.reset_carry(flags, state)
    for i in (0, 2):
        assert torch.equal(reset.z_H[i], model.inner.H_init.expand(12, 16))
        assert torch.equal(reset.z_L[i], model.inner.L_init.expand(12, 16))
    assert (reset.z_H[1] == 1).all() and (reset.z_L[1] == 2).all()


def test_the_carry_given_is_not_changed():
    model = tiny_model()
    carry, _ = step(model)
    before = copy.deepcopy(carry)
    step(model, tiny_batch(seed=9), carry)
    assert torch.equal(carry.inner_carry.z_H, before.inner_carry.z_H)
    assert torch.equal(carry.steps, before.steps)
    assert torch.equal(carry.halted, before.halted)
    assert_equal(carry.current_data, before.current_data)


@pytest.mark.parametrize("no_continue", [True, False])
@pytest.mark.parametrize("exploration", [0.0, 0.6])
def test_halting_and_new_data_against_a_loop(exploration, no_continue):
    model = tiny_model(
        batch_size=16,
        halt_max_steps=3,
        halt_exploration_prob=exploration,
        no_ACT_continue=no_continue,
    )
    size = 16
    carry = model.initial_carry(tiny_batch(size))
    halted, steps, boards = [True] * size, [0] * size, [None] * size
    seen = set()
    for number in range(6):
        batch = tiny_batch(size, seed=number)
        carry, outputs = step(model, batch, carry, seed=number)
        outputs = {name: value.detach() for name, value in outputs.items()}
        torch.manual_seed(number)
        uniform = torch.rand(size)
        least = torch.randint(2, 4, (size,), dtype=torch.int32)
        for i in range(size):
            if halted[i]:
                steps[i], boards[i] = 0, batch["inputs"][i].tolist()
            steps[i] += 1
            q = float(outputs["q_halt_logits"][i])
            against = 0.0 if no_continue else float(outputs["q_continue_logits"][i])
            waits = bool(uniform[i] < exploration) and steps[i] < int(least[i])
            halted[i] = (steps[i] >= 3 or q > against) and not waits
            seen.add((steps[i], halted[i]))
        assert carry.steps.tolist() == steps
        assert carry.halted.tolist() == halted
        assert carry.current_data["inputs"].tolist() == boards
    assert (3, True) in seen and (1, True) in seen and (1, False) in seen
    assert (3, False) not in seen


@pytest.mark.parametrize("changes", [{}, {"no_ACT_continue": False}], ids=["plain", "continue"])
def test_evaluation_runs_every_step_and_draws_nothing(changes):
    model = tiny_model(halt_exploration_prob=1.0, **changes).eval()
    with torch.no_grad():
        model.inner.q_head.bias.fill_(100.0)  # wants to halt at once
    carry = model.initial_carry(tiny_batch())
    for number in range(1, 5):
        carry, outputs = step(model, carry=carry)
        after = torch.rand(())
        torch.manual_seed(5)
        assert torch.equal(torch.rand(()), after)
        assert "target_q_continue" not in outputs
        assert carry.halted.tolist() == [number == 4] * 4


def test_one_step_at_most_draws_nothing():
    model = tiny_model(halt_max_steps=1, halt_exploration_prob=1.0, no_ACT_continue=False)
    carry = None
    for _ in range(2):
        carry, outputs = step(model, carry=carry)
        after = torch.rand(())
        torch.manual_seed(5)
        assert torch.equal(torch.rand(()), after)
        assert carry.halted.all()
        assert carry.steps.tolist() == [1] * 4
        assert "target_q_continue" not in outputs


def test_continue_target():
    model = tiny_model(no_ACT_continue=False, halt_max_steps=2, halt_exploration_prob=1.0)
    carry, _ = step(model)
    batch = tiny_batch(seed=2)
    carry.halted[:2] = True  # two boards start anew and are at step 1, the others at their last
    after, outputs = step(model, batch, carry)
    assert after.steps.tolist() == [1, 1, 2, 2]
    _, _, (q_halt, q_continue) = model.inner(after.inner_carry, after.current_data)
    want = torch.where(after.steps >= 2, q_halt, torch.maximum(q_halt, q_continue)).sigmoid()
    assert torch.equal(outputs["target_q_continue"], want)
    assert not outputs["target_q_continue"].requires_grad
    assert outputs["target_q_continue"].dtype == torch.float32


def test_looking_ahead_leaves_the_gradient_of_the_rows_alone():
    """The target's own pass reads the rows again: same ids, so the optimizer's view is right."""
    model = tiny_model(no_ACT_continue=False, halt_exploration_prob=1.0)
    batch = tiny_batch()
    gradients(model, batch)
    assert torch.equal(model.puzzle_emb.local_ids, batch["puzzle_identifiers"])
    assert model.puzzle_emb.local_weights.grad.abs().sum() > 0
