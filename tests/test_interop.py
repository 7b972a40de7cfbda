"""Weights from elsewhere: names, shapes, puzzle rows, and files that are not weights."""

import pytest
import torch

from trm_fast.checkpoint import CheckpointError
from trm_fast.interop import load_weights, write_official
from trm_fast.model import Model


def small_model(seed=0, identifiers=3, **changes):
    torch.manual_seed(seed)
    config = {
        "batch_size": 2, "seq_len": 4, "num_puzzle_identifiers": identifiers, "vocab_size": 5,
        "H_cycles": 1, "L_cycles": 1, "L_layers": 1, "hidden_size": 8, "expansion": 2,
        "num_heads": 2, "pos_encodings": "rope", "halt_max_steps": 2,
        "halt_exploration_prob": 0.1, "puzzle_emb_ndim": 8, "puzzle_emb_len": 1,
        "intermediate_multiple": 8, "forward_dtype": "float32",
    }  # fmt: skip
    model = Model(config | changes)
    with torch.no_grad():
        model.puzzle_emb.weights.normal_()
    return model


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.model.inner.", "model.inner.", "inner.", ""], ids=lambda p: p or "none"
)
def test_official_files_under_every_prefix(tmp_path, prefix):
    source, target = small_model(0), small_model(1)
    write_official(tmp_path / "step_5", source.state_dict(), prefix)
    assert load_weights(target, tmp_path / "step_5") is None
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name]), name


def test_rows_of_other_puzzles_become_their_mean(tmp_path):
    source, target = small_model(0, identifiers=3), small_model(1, identifiers=7)
    write_official(tmp_path / "step_5", source.state_dict())
    assert load_weights(target, tmp_path / "step_5") == 0
    mean = source.puzzle_emb.weights.mean(0)
    assert target.puzzle_emb.weights.shape == (7, 8)
    torch.testing.assert_close(target.puzzle_emb.weights, mean.expand(7, 8))
    assert torch.equal(source.inner.lm_head.weight, target.inner.lm_head.weight)


def test_buffers_that_nobody_saves_are_left_out(tmp_path):
    source = small_model(0)
    extra = dict(source.state_dict()) | {"inner.puzzle_emb.local_ids": torch.zeros(9)}
    torch.save({"_orig_mod.model." + k: v for k, v in extra.items()}, tmp_path / "step_1")
    assert load_weights(small_model(1), tmp_path / "step_1") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, r"is \[.*\], this model has"),
        ({"mlp_t": True}, "lacks inner.L_level.layers.0.mlp_t"),
        ({"pos_encodings": "learned"}, "lacks inner.embed_pos.embedding_weight"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(tmp_path, changes, message):
    write_official(tmp_path / "step_5", small_model(0).state_dict())
    target = small_model(1, **changes)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(target, tmp_path / "step_5")
    for name, value in before.items():
        assert torch.equal(value, target.state_dict()[name]), name


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "junk").write_bytes(b"\x80\x04junk")
    for path in (tmp_path / "junk", tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=str(path)):
            load_weights(small_model(), path)
