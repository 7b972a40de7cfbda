"""Several processes make the steps that one makes: gradients, halting, rows, metrics, carries."""

import pytest
import torch
from parity import relative_l2
from processes import in_processes
from training import make_config, make_data

from trm_fast.data.dataset import PuzzleDataset
from trm_fast.data.feed import Feed
from trm_fast.distributed import SINGLE, Ranks, asked_for
from trm_fast.flat import lay_out
from trm_fast.gradient_sum import GradientSum
from trm_fast.losses import ACTLossHead
from trm_fast.model import Model
from trm_fast.splits import dataset_config, open_splits
from trm_fast.train_step import TrainStep

STEPS = 2


def make_step(ranks, config):
    """A training step of this process's part, with rows and a halting head that are not zero."""
    splits = open_splits(config)
    shape = config.arch.model_config(
        batch_size=config.local_batch_size(ranks.world),
        seq_len=splits.train.seq_len,
        vocab_size=splits.train.vocab_size,
        num_puzzle_identifiers=splits.train.num_puzzle_identifiers,
    )
    torch.manual_seed(0)
    model = Model(shape).train()
    with torch.no_grad():
        model.inner.q_head.weight.normal_()
        model.inner.q_head.bias.zero_()
        model.puzzle_emb.weights.normal_()
    if config.arch.forward_dtype == "float64":
        model.double()
    dataset = PuzzleDataset(dataset_config(config, splits.paths, 1, test=False, ranks=ranks))
    head = ACTLossHead(model, config.arch.loss_type)
    return TrainStep(config, head, Feed(dataset, torch.device("cpu"), False), 8, ranks), dataset


def steps_of(ranks, config):
    """Gradients and metrics of each step, the end of it, and the whole carry in between."""
    step, dataset = make_step(ranks, config)
    made = []
    for number, batch in zip(range(1, STEPS + 1), dataset.choices(), strict=False):
        step.run(*batch, number)
        grads = {n: p.grad.clone() for n, p in step.model.named_parameters()}
        made.append((grads, step.sums.means(config.global_batch_size, ranks)))
        step.sums.clear()
    return made, dict(step.model.state_dict()), step.state_dict()["carries"]


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


CONFIGS = {
    "float32": {},
    "float64": {"arch__forward_dtype": "float64", "arch__backend": "reference"},
    "parts": {"grad_accum": 2, "augment": "sudoku"},
    "hrm": {"arch__name": "hrm", "arch__H_layers": 1, "arch__backend": "reference"},
}


def all_steps(ranks, configs):
    """`steps_of` each configuration: meeting costs more than the steps."""
    return {name: steps_of(ranks, config) for name, config in configs.items()}


def assert_one_step(theirs, wanted, limit):
    """Every process's gradients of the first step within `limit`, what follows from it close, and
    what is kept the same in all of them."""
    made, weights, carries = wanted
    carry = {key: torch.cat([c[key] for c in carries]) for key in ("steps", "halted")}
    for steps, end, whole in theirs:
        for number, ((grads, metrics), (want, numbers)) in enumerate(zip(steps, made, strict=True)):
            for name, grad in grads.items():
                assert relative_l2(grad, want[name]) < (limit if number == 0 else 1e-3), name
            assert metrics == pytest.approx(numbers, rel=1e-4)
        for name, value in end.items():
            assert relative_l2(value.double(), weights[name].double()) < 1e-3, name
            assert torch.equal(value, theirs[0][1][name]), f"processes differ in {name}"
        assert all(torch.equal(whole[0][key], value) for key, value in carry.items())


@pytest.mark.parametrize("world", [2, 4])
def test_processes_make_the_step_of_one(data, world):
    names = CONFIGS if world == 2 else ("float32",)
    settings = {"global_batch_size": 8, "ema": False}
    configs = {name: make_config(data, **settings, **CONFIGS[name]) for name in names}
    wanted = all_steps(SINGLE, configs)
    found = in_processes(world, all_steps, configs)
    for name, one in wanted.items():
        limit = 1e-12 if name == "float64" else 1e-6
        assert_one_step([each[name] for each in found], one, limit)
        if name == "float32":
            assert len(one[0]) == STEPS and any(t.any() for t in one[0][0][0].values())


def test_gradients_go_out_as_they_come_and_in_one_order(monkeypatch):
    """With stretches of a few bytes: the last parameters first, each once, the rest at the end."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 5, 4, 2)]
    grads = lay_out(params)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    sent = []
    monkeypatch.setattr(
        Ranks, "start_adding_up", lambda self, t: sent.append(t.data_ptr()) or (lambda: None)
    )
    adding = GradientSum(list(zip(params, grads, strict=True)), Ranks(0, 2), bytes_at_once=1)
    with adding:
        (params[3].sum() * params[0].sum() + params[1].sum()).backward()  # not params[2]
    assert sent == [grad.data_ptr() for grad in reversed(grads)]
    sent.clear()
    params[0].sum().backward()  # outside: nothing goes out
    assert sent == []
    with pytest.raises(RuntimeError), adding:
        raise RuntimeError
    assert sent == []


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"WORLD_SIZE": "2"}, "RANK must be a whole number beside WORLD_SIZE, got None"),
        (
            {"WORLD_SIZE": "2", "RANK": "-1"},
            "RANK must be a whole number beside WORLD_SIZE, got '-1'",
        ),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK must be in 0..1, got 2"),
    ],
)
def test_a_launcher_s_environment_that_is_not_whole(monkeypatch, environment, wanted):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert asked_for() == 1
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=wanted):
        asked_for()


def test_batches_that_cannot_be_divided():
    with pytest.raises(ValueError, match="10 is not a multiple of the 4 processes"):
        Ranks(0, 4).share(10)
