"""The step of the trainer against a plain loop on the host, bitwise; and that it never waits.

The plain loop counts in Python, looks at every gradient before it goes on, and calls the same
operations in the same order with the same random numbers.
"""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from capturing import InPlace, NeverWaits, Recorded
from training import assert_same, make_config, make_data, make_trainer

from trm_fast import backends, optim, optimizers, train_step
from trm_fast.data.augment import AUGMENTATIONS, augmentation_words, hand_back
from trm_fast.data.building import one_kind
from trm_fast.data.dataset import PuzzleDataset
from trm_fast.data.feed import Feed
from trm_fast.data.format import one_puzzle_per_group, write_dataset
from trm_fast.data.maze_generator import generate
from trm_fast.distributed import Ranks
from trm_fast.ema import EMA
from trm_fast.flat import lay_out
from trm_fast.losses import ACTLossHead, MetricSums
from trm_fast.model import Model
from trm_fast.noise import WORDS, starts
from trm_fast.philox import Draws, integers, uniform
from trm_fast.recursion import Exploration
from trm_fast.splits import dataset_config, open_splits
from trm_fast.train_step import EXPLORATION, STATES, TrainStep

MLP = {
    "arch__mlp_t": True,
    "arch__puzzle_emb_ndim": 0,
    "arch__puzzle_emb_len": 0,
    "arch__pos_encodings": "none",
}
VARIANTS = {
    "attention": {},
    "mlp-sudoku": {**MLP, "augment": "sudoku", "curriculum": 0.8, "grad_clip": 0.5},
    "dihedral": {"augment": "dihedral"},
    "adamw": {"optimizer": "adamw", "ema_warmup": True, "grad_clip": 1.0, "lr_min_ratio": 0.1},
    "muon": {"optimizer": "muon", **MLP},
    "parts": {"grad_accum": 2, "ema": False},
    "q-continue": {"arch__no_ACT_continue": False, "arch__q_logits": 2},
    "rows-only": {"freeze_weights": True},
    "recompute": {"arch__policy": "recompute", "arch__L_layers": 2},
    "singlez": {"arch__name": "trm_singlez", **MLP},
    "hier6": {"arch__name": "trm_hier6", "arch__L_cycles": 6},
    "hrm": {"arch__name": "hrm", "arch__q_logits": 2, "arch__H_layers": 1},
    "gated": {
        "arch__name": "gated_mlp",
        "arch__vector_gates": True,  # a single number is rounded otherwise than one of many
        **MLP,
        "arch__mlp_t": False,
        "arch__halt_max_steps": 1,
        "arch__loss_type": "softmax_cross_entropy",
        "constraint_weight": 0.1,
        "augment": "sudoku",
    },
    "baseline": {"arch__name": "transformers_baseline", "arch__H_layers": 2, "arch__q_logits": 2},
    "noise": {
        "arch__damping": 0.95,
        "arch__noise": 0.01,
        "arch__random_init": True,
        "grad_accum": 2,
    },
    "stages": {"depth_stages": ["0.5:1x1"], "step_loss_decay": 0.7, "arch__L_cycles": 2},
    "latents": {"arch__latents": 3, "grad_accum": 2, **MLP},
}
STEPS = 12


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def settings(data, variant, **changes):
    config = make_config(data, steps=STEPS, **VARIANTS[variant], **changes)
    # Both libraries' kernels want whole vectors.
    return config.replace({"arch.hidden_size": 32, "arch.intermediate_multiple": 16})


def head_of(trainer):
    torch.manual_seed(trainer.config.seed)
    config, model = trainer.config, Model(trainer.model_config).train()
    own = config.constraint_weight, config.constraint_boxes, config.step_loss_decay
    return ACTLossHead(model, config.arch.loss_type, *own)


class PlainLoop:
    """What a training loop does that reads what it needs when it needs it."""

    def __init__(self, trainer):
        self.config, self.total = trainer.config, trainer.total_steps
        self.head = head_of(trainer)
        self.model = self.head.model
        params = [p for p in self.model.parameters() if p.requires_grad]
        for p, place in zip(params, lay_out(params), strict=True):  # the same ends, see test_flat
            p.data = place.copy_(p.detach())
        self.ema = EMA(self.model, self.config.ema_rate, self.config.ema_warmup)
        self.optimizers = optim.build_optimizers(self.model, self.config)
        self.carries, self.sums, self.step, self.skipped = [], MetricSums(), 0, 0

    def run(self, batch):
        self.step += 1
        config, rows = self.config, torch.arange(self.config.global_batch_size)
        fading = config.curriculum * self.total
        counts = augmentation_words(batch["inputs"].shape[1], config.augment, self.step < fading)
        counts = {EXPLORATION: 2, STATES: WORDS, **counts}
        draws = Draws(config.seed, torch.tensor(self.step), rows, counts)
        self.model.inner.cycles = config.cycles(self.step, self.total)
        if config.augment != "none":
            change = AUGMENTATIONS[config.augment]
            batch["inputs"], batch["labels"] = change(batch["inputs"], batch["labels"], draws)
        if self.step < fading:
            fraction = float(np.float32(1) - np.float32(self.step / fading))
            batch["inputs"] = hand_back(batch["inputs"], batch["labels"], fraction, draws)
        words = draws.words(EXPLORATION)
        drawn = uniform(words[:, 0]), integers(words[:, 1], 2, config.arch.halt_max_steps + 1)
        drawn = *drawn, starts(draws.words(STATES))
        ids, gradients, loss = [], [], 0.0
        for index, part in enumerate(rows.chunk(config.grad_accum)):
            mine = {name: value[part] for name, value in batch.items()}
            if len(self.carries) == index:
                self.carries.append(self.head.initial_carry(mine))
            self.carries[index], one, metrics, _, _ = self.head(
                (), self.carries[index], mine, Exploration(*(d[part] for d in drawn))
            )
            (one / config.global_batch_size).backward()
            self.sums.add(metrics)
            loss += one.item()
            if config.grad_accum > 1 and config.arch.puzzle_emb_ndim:
                emb = self.model.puzzle_emb
                ids.append(emb.local_ids[: len(part)].clone())
                gradients.append(emb.local_weights.grad[: len(part)].clone())
                emb.local_weights.grad = None
        if ids:
            self.model.puzzle_emb.local_ids.copy_(torch.cat(ids))
            self.model.puzzle_emb.local_weights.grad = torch.cat(gradients)
        norm = optim.clip_gradients(self.optimizers, config.grad_clip)
        if math.isfinite(loss) and math.isfinite(norm):
            self.apply()
        else:
            self.skipped += 1
        self.model.zero_grad(set_to_none=True)
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def apply(self):
        config, averaged = self.config, False
        for optimizer, base in self.optimizers:
            now = self.step, base, config.lr_warmup_steps, self.total, config.lr_min_ratio
            rate = optim.cosine_schedule(*now)
            adamw = isinstance(optimizer, torch.optim.AdamW)
            for group in optimizer.param_groups:
                group["lr"] = float(np.float32(rate)) if adamw else rate
            if config.ema and isinstance(optimizer, optim.AdamATan2):
                decay = float(self.ema.advance())
                optimizer.step(emas=list(self.ema.shadow.values()), ema_decay=decay)
                averaged = True
            else:
                optimizer.step()
        if config.ema and not averaged:
            self.ema.update(self.model)


def state(step):
    """Everything that decides how a run goes on."""
    flat = {f"model.{n}": v for n, v in step.model.state_dict().items()}
    if step.config.ema:
        flat |= {f"ema.{n}": v for n, v in step.ema.shadow.items()}
        flat["ema.updates"] = step.ema.updates
    for i, (optimizer, _) in enumerate(step.optimizers):
        for key, values in optimizer.state_dict()["state"].items():
            flat |= {f"optimizer.{i}.{key}.{n}": torch.as_tensor(v) for n, v in values.items()}
    for i, carry in enumerate(step.carries):
        values = carry.to_dict()
        flat |= {f"carry.{i}.{n}": v for n, v in (values | values.pop("current_data")).items()}
    return flat | {f"sum.{n}": float(v) for n, v in step.sums.state_dict()["values"].items()}


def poisoned(step, at):
    """Make the gradient NaN in the given step, counted on the device or in Python."""
    inner = step.model.inner
    weight = (inner.output_proj if hasattr(inner, "output_proj") else inner.lm_head).weight
    counted = getattr(step, "_count", None)

    def poison(grad):
        now = torch.tensor(step.step) if counted is None else counted
        return torch.where(now == at, math.nan, grad)

    weight.register_hook(poison)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bitwise_the_trajectory_of_a_plain_loop(data, tmp_path, variant, backend):
    trainer = make_trainer(settings(data, variant, arch__backend=backend), tmp_path)
    plain = PlainLoop(trainer)
    step = trainer.train_step
    start = {n: v.clone() for n, v in step.model.state_dict().items()}
    assert_same(state(plain), state(step))
    if variant != "rows-only":
        for one in (plain, step):
            poisoned(one, at=4)
    while trainer.step < STEPS:
        for name, examples in trainer.dataset.choices():
            trainer.advance(name, examples)
            plain.run(trainer.dataset.collate(name, examples))
            assert_same(state(plain), state(step))
            if trainer.step == STEPS:
                break
    assert step.guard.read().skipped == plain.skipped == (variant != "rows-only")
    moved = [n for n, v in step.model.state_dict().items() if not torch.equal(v, start[n])]
    assert moved == (["inner.puzzle_emb.weights"] if variant == "rows-only" else trained(step))


def trained(step):
    rows = ["inner.puzzle_emb.weights"] if step.model_config.puzzle_emb_ndim else []
    names = rows + [name for name, _ in step.model.named_parameters()]
    return [name for name in step.model.state_dict() if name in names]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_without_python_it_is_the_same(data, tmp_path, variant, backend, monkeypatch):
    """Nothing that changes from step to step is frozen into what a graph repeats."""
    plain = make_trainer(settings(data, variant, arch__backend=backend), tmp_path).train_step
    monkeypatch.setattr("trm_fast.train_step.Capture", Recorded)
    trainer = make_trainer(settings(data, variant, arch__backend=backend), tmp_path)
    step, number, replayed = trainer.train_step, 0, 0
    while number < STEPS:
        for name, examples in trainer.dataset.choices():
            number += 1
            replayed += step.captured
            for one in (plain, step):
                one.run(name, examples, number)
            assert_same(state(plain), state(step))
            if number == STEPS:
                break
    # Another variant of the step is captured anew.
    assert replayed == {"mlp-sudoku": 6, "stages": 5}.get(variant, STEPS - 4)


def test_a_resumed_step_is_captured_anew(data, tmp_path, monkeypatch):
    """In tensors of its own: a graph would go on with the ones it knew."""
    config = settings(data, "attention", save_interval=1)
    straight = make_trainer(config, tmp_path / "straight")
    monkeypatch.setattr("trm_fast.train_step.Capture", Recorded)
    again = make_trainer(config, tmp_path / "again")
    for trainer in (straight, again):
        trainer.run()
    assert again.train_step.captured
    again.resume(tmp_path / "straight" / "step_5")
    assert not again.train_step.captured
    again.run()
    assert_same(state(straight.train_step), state(again.train_step))


def test_what_is_handed_back_of_mazes_is_their_path(tmp_path):
    """The cells to be filled in are the open ones there, token 2; 1 is a wall."""
    boards, answers = generate(8, size=5, seed=1)
    train = one_kind(6, 25, 8), {"all": one_puzzle_per_group(boards, answers)}
    write_dataset(tmp_path / "data", {"train": train})
    config = settings(str(tmp_path / "data"), "attention", curriculum=1.0)
    step = make_trainer(config, tmp_path / "run").train_step
    step.run("all", np.arange(4), 1)
    batch, _ = step._next_batch()
    before, given = torch.from_numpy(boards[:4]).int(), batch["inputs"]
    assert set(given[given != before].tolist()) == {5}
    assert (given[given != before] == batch["labels"][given != before]).all()


def test_a_profiler_is_given_plain_calls(data, tmp_path, monkeypatch):
    monkeypatch.setattr("trm_fast.train_step.Capture", Recorded)
    trainer = make_trainer(settings(data, "attention"), tmp_path)
    name, examples = next(iter(trainer.dataset.choices()))
    for number in range(1, 8):
        trainer.train_step.run(name, examples, number, plain=True)
    assert not trainer.train_step.captured


def test_the_puzzles_that_are_told_are_those_worked_on(data, tmp_path):
    """Not the new ones of the batch, which unfinished items did not take."""
    trainer = make_trainer(settings(data, "attention"), tmp_path)
    poisoned(trainer.train_step, at=2)
    trainer.train_step.guard.limit = 1
    for number, first in ((1, 0), (2, 4)):
        trainer.train_step.run("all", np.arange(first, first + 4), number)
    worked_on = trainer.train_step.carries[0].current_data["puzzle_identifiers"]
    assert trainer.train_step.worked_on() == worked_on.unique().tolist()
    trainer.train_step.run("all", np.array([3, 3, 3, 3]), 3)
    assert trainer.train_step.worked_on() == worked_on.unique().tolist()


def test_what_is_done_to_the_model_between_steps(data, tmp_path):
    trainer = make_trainer(settings(data, "attention"), tmp_path / "a")
    other = make_trainer(settings(data, "attention"), tmp_path / "b").train_step
    step, batches = trainer.train_step, list(trainer.dataset.choices())
    for number, batch in enumerate(batches, start=1):
        step.model.zero_grad()
        for one in (step, other):
            one.run(*batch, number)
    assert_same(state(step), state(other))
    with pytest.raises(ValueError, match="3 examples were given, a batch has 4"):
        step.run("all", np.arange(3), 6)
    step.model.eval()
    with pytest.raises(ValueError, match="the model is in evaluation mode"):
        step.run(*batches[0], 6)
    step.model.train().double().float()
    with pytest.raises(ValueError, match="weights were moved after its training step was made"):
        step.run(*batches[0], 6)
    with pytest.raises(ValueError, match="the feed has batches of 4, each process has 8 of global"):
        TrainStep(step.config.replace({"global_batch_size": 8}), step.head, step.feed, 9)


def test_a_step_is_freed_with_the_last_reference(data, tmp_path):
    trainer = make_trainer(settings(data, "attention"), tmp_path)
    trainer.run()
    gone = weakref.ref(trainer.train_step)
    gc.disable()
    try:
        del trainer.train_step
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_it_is_captured_everything_stays_in_its_place(data, tmp_path, variant, monkeypatch):
    """As a graph needs it; and the numbers are the same."""
    plain = make_trainer(settings(data, variant), tmp_path).train_step
    monkeypatch.setattr("trm_fast.train_step.Capture", InPlace)
    trainer = make_trainer(settings(data, variant), tmp_path)
    step = trainer.train_step
    before = None
    for number, (name, examples) in enumerate(trainer.dataset.choices(), start=1):
        plain.run(name, examples, number)
        step.run(name, examples, number)
        places = [t.data_ptr() for t in state(step).values() if isinstance(t, torch.Tensor)]
        places += [step._count.data_ptr(), step.guard._counts.data_ptr()]
        places += [step.sums.totals.data_ptr(), *(g.data_ptr() for g in step._gradients)]
        assert places == (before or places)
        before = places
    assert number > 4
    assert_same(state(plain), state(step))


@pytest.mark.parametrize("variant", ["attention", "mlp-sudoku"])
def test_data_on_the_device_gives_the_same_batches(data, tmp_path, variant):
    trainer = make_trainer(settings(data, variant), tmp_path)
    resident = TrainStep(
        trainer.config,
        head_of(trainer),
        Feed(trainer.dataset, torch.device("cpu"), resident=True),
        trainer.total_steps,
    )
    for number, (name, examples) in enumerate(trainer.dataset.choices(), start=1):
        for step in (trainer.train_step, resident):
            step.run(name, examples, number)
    assert number > 4
    assert_same(state(trainer.train_step), state(resident))


@pytest.mark.parametrize("waits", ["item", "nonzero", "mask", "cpu"])
def test_waiting_is_noticed(waits):
    t = torch.ones(3, device="cpu" if waits in ("item", "mask", "nonzero") else "meta")
    with pytest.raises(AssertionError), NeverWaits("meta" if waits == "cpu" else "cpu"):
        match waits:
            case "item":
                t.sum().item()
            case "nonzero":
                t.nonzero()
            case "mask":
                t[t > 0]
            case "cpu":
                t * torch.tensor(2.0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_in_the_step_waits_for_the_device(data, tmp_path, variant, backend):
    """On tensors without data, so that nothing could be read; AdamW's kernel wants some."""
    device = "cpu" if variant in ("adamw", "muon") else "meta"
    trainer = make_trainer(settings(data, variant, arch__backend="reference"), tmp_path)
    model = Model(trainer.model_config).to(device).train()
    if backend == "triton":
        if device != "meta":
            pytest.skip("the kernels run on GPUs; AdamW does not run on tensors without data")
        model.inner.ops = backends.table("triton")
    head = ACTLossHead(model, "stablemax_cross_entropy")
    step = TrainStep(
        trainer.config,
        head,
        Feed(trainer.dataset, torch.device(device), resident=True),
        trainer.total_steps,
    )
    for hands_back in (True, False):
        step._hands_back = hands_back and trainer.config.curriculum > 0
        step._step()  # makes what is made once
        with NeverWaits(device) as mode:
            step._step()
        assert mode.calls > (200 if variant == "gated" else 300)


@pytest.mark.parametrize("variant", ["attention", "mlp-sudoku", "parts", "rows-only"])
def test_nothing_in_a_step_s_halves_waits_where_processes_meet_between_them(
    data, tmp_path, monkeypatch, variant
):
    monkeypatch.setattr(train_step, "Capture", InPlace)
    monkeypatch.setattr(optimizers.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(optimizers.dist, "get_world_size", lambda: 2)
    own_of = lambda whole, own: whole[: len(own)].copy_(own)  # noqa: E731
    monkeypatch.setattr(optimizers, "gather_into_", own_of)
    config, ranks = settings(data, variant, arch__backend="reference"), Ranks(0, 2)
    splits = open_splits(config)
    dataset = PuzzleDataset(dataset_config(config, splits.paths, 1, test=False, ranks=ranks))
    shape = config.arch.model_config(
        batch_size=2, seq_len=16, vocab_size=6, num_puzzle_identifiers=4
    )
    head = ACTLossHead(Model(shape).to("meta").train(), "stablemax_cross_entropy")
    feed = Feed(dataset, torch.device("meta"), resident=True)
    step = TrainStep(config, head, feed, 9, ranks)

    def halves():
        with NeverWaits("meta") as first:
            step._gradients_of_batch()
        for optimizer in step._of_rows:
            optimizer.gather()
        with NeverWaits("meta") as second:
            step._update()
        assert first.calls > 200 and second.calls > 20

    step._gradients_of_batch()  # makes what is made once
    halves()
