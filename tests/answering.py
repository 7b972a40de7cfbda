"""What the tests of evaluate and solve share: tiny 4x4 models, saved as the trainer saves them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trm_fast.checkpoint import save_checkpoint, write_pointer
from trm_fast.config import ModelConfig, from_preset
from trm_fast.data.dataset import from_arrays
from trm_fast.data.format import write_dataset
from trm_fast.model import Model
from trm_fast.puzzle_kind import kind_of

CELLS, VOCAB, DEPTH = 16, 6, 3
SOLVED = "1234341221434321"
BLANK = "." * CELLS


def tiny_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "batch_size": 4,
        "seq_len": CELLS,
        "vocab_size": VOCAB,
        "num_puzzle_identifiers": 1,
        "H_cycles": 1,
        "L_cycles": 1,
        "L_layers": 1,
        "hidden_size": 16,
        "expansion": 2.0,
        "intermediate_multiple": 8,
        "num_heads": 2,
        "pos_encodings": "rope",
        "halt_max_steps": DEPTH,
        "halt_exploration_prob": 0.1,
        "puzzle_emb_len": 0,
        "forward_dtype": "float32",
    }
    return ModelConfig.from_dict(values | changes)


def tiny_model(seed: int = 0, **changes: Any) -> Model:
    """A model with weights so large that answers and halting logits differ from step to step."""
    torch.manual_seed(seed)
    model = Model(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6)
    return model.eval()


def with_given(model: Model, inputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What `predict` makes of a model's own tokens [N, L]: those that the puzzle gives in place."""
    given = kind_of(model.config).given(inputs)
    return torch.where(given, inputs.long(), tokens.long())


def boards(count: int, seed: int = 0, cells: int = CELLS, vocab: int = VOCAB) -> np.ndarray:
    """Token arrays [count, cells] with no padding token."""
    return np.random.default_rng(seed).integers(1, vocab, (count, cells)).astype(np.uint8)


def write_data(root: Path, inputs: np.ndarray, labels: np.ndarray, vocab: int = VOCAB) -> Path:
    """A data directory with one split, test."""
    metadata, arrays = from_arrays(inputs, labels, vocab_size=vocab, ignore_label_id=0)
    write_dataset(root, {"test": (metadata, {"all": arrays})})
    return root


def save_run(
    run: Path,
    *,
    steps: tuple[int, ...] = (7,),
    seed: int = 0,
    ema: bool = True,
    data: Path | None = None,
    test_data: Path | None = None,
    changes: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> Path:
    """A run folder with a checkpoint per step; seed + step gives its weights, + 100 the EMA's."""
    train_config = from_preset("sudoku-mini").to_dict() | (train or {})
    paths = [str(data)] if data else []
    test_paths = [str(test_data)] if test_data else []
    for step in steps:
        model = tiny_model(seed + step, **(changes or {}))
        average = tiny_model(seed + step + 100, **(changes or {}))
        config = train_config | {
            "model": asdict(model.config),
            "data": {"data_paths": paths, "data_paths_test": test_paths, "metadata": {}},
        }
        folder = save_checkpoint(
            run,
            step,
            model=model.state_dict(),
            ema=average.state_dict() if ema else None,
            config=config,
            train_state={},
        )
        write_pointer(run, "last", folder.name)
    return run
