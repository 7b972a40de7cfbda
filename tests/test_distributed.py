"""Several processes make the steps that one makes: gradients, halting, rows, metrics, carries."""

from pathlib import Path

import pytest
import torch
from capturing import Recorded
from parity import relative_l2
from processes import in_processes
from training import make_config, make_data

from trm_fast import train_step
from trm_fast.capture import WARMUP, Capture
from trm_fast.config import ConfigError
from trm_fast.data.dataset import PuzzleDataset
from trm_fast.data.feed import Feed
from trm_fast.distributed import SINGLE, Elsewhere, Ranks, asked_for, join
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
    dataset = PuzzleDataset(dataset_config(config, splits.paths, 8, test=False, ranks=ranks))
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
    "noise": {
        "arch__damping": 0.9,
        "arch__noise": 0.1,
        "arch__random_init": True,
        "depth_stages": ["0.2:1x1"],
        "arch__forward_dtype": "float64",
        "arch__backend": "reference",
    },
    "latents": {
        "arch__latents": 3,
        "grad_accum": 2,
        "arch__forward_dtype": "float64",
        "arch__backend": "reference",
    },
    "hrm": {
        "arch__name": "hrm",
        "arch__H_layers": 1,
        "arch__forward_dtype": "float64",
        "arch__backend": "reference",
    },
}


def all_steps(ranks, configs):
    """`steps_of` each configuration: meeting costs more than the steps."""
    return {name: steps_of(ranks, config) for name, config in configs.items()}


def replayed(ranks, config):
    """Whether steps whose two halves are repeated without Python, as CUDA's graphs are, make the
    weights of plain ones, and how many of such halves there were."""
    ends = []
    for capture in (Capture, Recorded):
        train_step.Capture = capture
        try:
            step, dataset = make_step(ranks, config)
            for number, batch in zip(range(1, 2 * WARMUP + 1), dataset.choices(), strict=False):
                step.run(*batch, number)
        finally:
            train_step.Capture = Capture
        ends.append({name: value.clone() for name, value in step.model.state_dict().items()})
    plain, graphs = ends
    return all(torch.equal(graphs[name], plain[name]) for name in plain), Recorded.made


def agreements(ranks, folder):
    """What the processes tell each other, and who speaks where one of them fails."""
    place = Path(folder, "made")

    def fails():
        raise ValueError(f"process {ranks.rank}")

    def turn():
        with open(place, "a") as file:
            file.write(str(ranks.rank))
        return place.read_text()

    said = []
    for attempt in (
        lambda: ranks.together(fails),
        lambda: ranks.together(fails if ranks.rank else int),
        lambda: ranks.of_first(fails),
        lambda: ranks.in_turn(fails if ranks.rank else int),
    ):
        with pytest.raises((ValueError, Elsewhere)) as caught:
            attempt()
        said.append(str(caught.value))
    own = torch.tensor([ranks.rank + 1.0])
    whole = ranks.totals(own)
    return said, {
        "numbers": ranks.numbers(5 + ranks.rank),
        "any": (ranks.any(lambda: ranks.rank == 1), ranks.any(lambda: False)),
        "of_first": ranks.of_first(lambda: ranks.rank + 7),
        "in_turn": ranks.in_turn(turn),
        "totals": (whole.item(), own.item()),
        "collected": ranks.collected(torch.full((2, 1), ranks.rank)).flatten().tolist(),
    }


def everything_of_two(ranks, configs, folder):
    return all_steps(ranks, configs), replayed(ranks, configs["parts"]), agreements(ranks, folder)


def assert_one_step(theirs, wanted, limit):
    """Every process's gradients of the first step within `limit`, what follows from it close, and
    what is kept the same in all of them."""
    made, weights, carries = wanted
    carry = {key: torch.cat([c[key] for c in carries]) for key in ("steps", "halted")}
    (whole,) = theirs[0][2]
    assert all(torch.equal(whole[key], value) for key, value in carry.items())
    for steps, end, _ in theirs:
        for number, ((grads, metrics), (want, numbers)) in enumerate(zip(steps, made, strict=True)):
            apart = relative_l2(flat(grads), flat(want))
            assert apart < (limit if number == 0 else 1e-3), number
            if number == 0:  # and each by itself
                assert all(relative_l2(g, want[name]) < 4 * limit for name, g in grads.items())
            assert metrics == pytest.approx(numbers, rel=1e-4)
        for name, value in end.items():
            assert relative_l2(value.double(), weights[name].double()) < 1e-3, name
            assert torch.equal(value, theirs[0][1][name]), f"processes differ in {name}"


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def assert_agreed(first, second):
    elsewhere = "process {} of the run says why"
    assert first[0] == ["process 0", elsewhere.format(1), "process 0", elsewhere.format(1)]
    assert second[0] == [elsewhere.format(0), "process 1", elsewhere.format(0), "process 1"]
    same = {"numbers": [5, 6], "any": (True, False), "of_first": 7}
    assert first[1] == same | {"in_turn": "0", "totals": (3, 1), "collected": [0, 0, 1, 1]}
    assert second[1] == same | {"in_turn": "01", "totals": (3, 2), "collected": [1, 1]}


@pytest.mark.parametrize("world", [2, 4])
def test_processes_make_the_step_of_one(data, tmp_path, world):
    names = CONFIGS if world == 2 else ("float32", "float64")
    settings = {"global_batch_size": 8, "ema": False}
    configs = {name: make_config(data, **settings, **CONFIGS[name]) for name in names}
    wanted = all_steps(SINGLE, configs)
    if world == 2:
        found = in_processes(world, everything_of_two, configs, str(tmp_path))
        assert [replays for _, replays, _ in found] == [(True, 2)] * 2
        assert_agreed(*(agreed for _, _, agreed in found))
        found = [steps for steps, _, _ in found]
    else:
        found = in_processes(world, all_steps, configs)
    for name, one in wanted.items():
        limit = 1e-12 if configs[name].arch.forward_dtype == "float64" else 1e-6
        assert_one_step([each[name] for each in found], one, limit)
        if name == "float32":
            assert len(one[0]) == STEPS and flat(one[0][0][0]).any()


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
    adding.begin()
    (params[3].sum() * params[0].sum() + params[1].sum()).backward()  # not params[2]
    assert sent == [grads[3].data_ptr()], "the second has no gradient yet"
    adding.finish()
    assert sent == [grad.data_ptr() for grad in reversed(grads)]
    sent.clear()
    params[0].sum().backward()  # outside: nothing goes out
    assert sent == []
    adding.finish()
    assert sent == [grad.data_ptr() for grad in reversed(grads)]


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
    assert asked_for() is SINGLE
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=wanted):
        asked_for()


def test_a_launcher_of_one_process(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert asked_for() is SINGLE and join(SINGLE, torch.device("cpu")) is SINGLE


def test_batches_that_cannot_be_divided(data):
    config = make_config(data, global_batch_size=8, eval_batch_size=6, grad_accum=2)
    assert config.local_batch_size(2) == 4
    for processes, wanted in {
        3: "global_batch_size must be a multiple of the 3 processes, got 8",
        4: "eval_batch_size must be a multiple of the 4 processes, got 6",
    }.items():
        with pytest.raises(ConfigError, match=wanted):
            config.local_batch_size(processes)
    wanted = "must be a multiple of grad_accum times the 8 processes, got 8 and grad_accum=2"
    with pytest.raises(ConfigError, match=wanted):
        config.replace({"eval_batch_size": None}).local_batch_size(8)


def test_devices_of_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert SINGLE.device(torch.device("mps")).type == "mps"
    assert Ranks(3, 4, 3).device(cpu) == cpu
    assert Ranks(3, 4, 1).device(cuda) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own: there"):
        Ranks(2, 4, 2).device(cuda)
    for other in ("mps", "cuda:0"):
        with pytest.raises(ValueError, match=f"device is {other}; 4 processes take cuda or cpu"):
            Ranks(2, 4, 0).device(torch.device(other))
