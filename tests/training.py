"""A small training job for tests: data, settings, a Reporter that remembers, states compared."""

from pathlib import Path

import numpy as np
import torch

from trm_fast.config import TrainConfig
from trm_fast.data.dataset import from_arrays
from trm_fast.data.format import write_dataset
from trm_fast.splits import open_splits
from trm_fast.trainer import Trainer

SEQ, VOCAB = 16, 6


class Recorder:
    """A Reporter that remembers, and stops the run at a step of choice."""

    def __init__(self, stop_at=None):
        self.stop_at, self.trainer = stop_at, None
        self.steps, self.evaluations, self.saved, self.skipped = [], [], [], []
        self.profiles = []

    def on_step(self, trainer, metrics):
        self.trainer = trainer
        self.steps.append((trainer.step, metrics))

    def on_evaluation(self, trainer, reports):
        self.evaluations.append((trainer.step, reports))

    def on_checkpoint(self, trainer, path):
        if path.name not in self.saved[-1:]:  # before an evaluation, and after it
            self.saved.append(path.name)

    def on_skip(self, trainer, state):
        self.skipped.append((trainer.step, state))

    def on_profile(self, trainer, line):
        self.profiles.append((trainer.step, line))

    def wants_to_stop(self):
        return self.stop_at is not None and self.trainer.step >= self.stop_at


def make_data(folder):
    """Write 20 puzzles to train on and 10 to test on, of 4 identifiers; returns the folder."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 20), ("test", 10)):
        tokens = rng.integers(2, VOCAB, (count, SEQ)).astype(np.uint8)
        blanks = np.where(rng.random(tokens.shape) < 0.5, 1, tokens).astype(np.uint8)
        ids = np.arange(count) % 4
        metadata, arrays = from_arrays(blanks, tokens, vocab_size=VOCAB, puzzle_identifiers=ids)
        splits[split] = (metadata, {"all": arrays})
    write_dataset(folder, splits, ["<blank>", "a", "b", "c"])
    return str(folder)


def make_config(data, **changes):
    values = {
        "data_paths": [data],
        "evaluators": [],
        "global_batch_size": 4,
        "steps": 8,
        "eval_steps": 4,
        "lr": 1e-2,
        "lr_warmup_steps": 2,
        "puzzle_emb_lr": 1e-2,
        "ema": True,
        "arch.hidden_size": 16,
        "arch.num_heads": 2,
        "arch.L_layers": 1,
        "arch.H_cycles": 2,
        "arch.L_cycles": 1,
        "arch.intermediate_multiple": 8,
        "arch.halt_max_steps": 3,
        "arch.halt_exploration_prob": 0.5,
        "arch.puzzle_emb_len": 1,
        "arch.forward_dtype": "float32",
        "device": "cpu",
    }
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return TrainConfig.from_dict(values | dotted)


def make_trainer(config, run_dir, reporter=None):
    return Trainer(config, open_splits(config), Path(run_dir), reporter or Recorder())


def everything(trainer):
    """All that decides how a run goes on, as a flat dictionary of tensors and plain values."""
    flat = {}

    def walk(value, name):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for key, item in enumerate(value):
                walk(item, f"{name}.{key}")
        else:
            flat[name] = value.clone() if isinstance(value, torch.Tensor) else value

    walk(trainer.state_dict(), "state")
    walk(dict(trainer.model.state_dict()), "model")
    walk(trainer.ema.shadow if trainer.ema else {}, "ema")
    return flat


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
