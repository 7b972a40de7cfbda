"""Checkpoints of s4nj1th/tiny-recursive-model: both versions, their pickled settings, and back."""

import pytest
import torch
from foreign_models import H_CYCLES, L_CYCLES, s4nj1th_digits, s4nj1th_weights
from test_foreign import close, exact, outputs

from trm_fast.convert import main
from trm_fast.foreign import read_foreign
from trm_fast.pretrained import read_saved

CYCLES = {"H_cycles": H_CYCLES, "L_cycles": L_CYCLES}


class TRMConfig:
    """As the notebook has it, in __main__."""

    L_layers, H_cycles = 9, 9  # of the class: not in the pickle


TRMConfig.__module__ = "__main__"


@pytest.mark.parametrize(("gates", "semantics"), [((1,), "v1"), ((), "head")])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "older"])
def test_s4nj1th_checkpoints(tmp_path, monkeypatch, gates, semantics, new):
    import __main__

    monkeypatch.setattr(__main__, "TRMConfig", TRMConfig, raising=False)
    config = TRMConfig()
    vars(config).update(H_cycles=4, L_cycles=8, dropout=0.1, hidden_dim=12, data_path="a.csv")
    document = {
        "model_state_dict": s4nj1th_weights(gates),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "config": config,
        "train_losses": [1.0],
    }
    path = tmp_path / "trm_sudoku_best.pt"
    torch.save(document, path, _use_new_zipfile_serialization=new)
    foreign = read_foreign(path)
    assert (foreign.format, foreign.arch) == ("s4nj1th", "gated_mlp")
    assert foreign.settings == {
        **{"H_cycles": 4, "L_cycles": 8, "dropout": 0.1, "hidden_dim": 12, "data_path": "a.csv"},
        **{"input_dim": 810, "output_dim": 729, "L_layers": 3, "semantics": semantics},
    }
    for name, value in document["model_state_dict"].items():
        assert torch.equal(foreign.model[name], value)
    other = {"v1": "head", "head": "v1"}[semantics]
    chosen = read_foreign(path, given={"semantics": other})
    assert chosen.settings["semantics"] == other
    assert chosen.notes == [f"its gates are those of {semantics}; run as {other}, as asked"]


@pytest.mark.parametrize(("gates", "semantics"), [((1,), "v1"), ((), "head")])
@pytest.mark.parametrize("asked", [None, "v1", "head"])
def test_s4nj1th_checkpoints_compute_what_its_code_computes(tmp_path, gates, semantics, asked):
    weights, path = s4nj1th_weights(gates), tmp_path / "production.pt"
    settings = {"H_cycles": 2, "L_cycles": 3, "dropout": 0.1, "hidden_dim": 12}
    torch.save({"model_state_dict": weights, "config": settings}, path)
    given = {"semantics": asked} if asked else {}
    boards = torch.arange(162).view(2, 81) % 10
    got, _ = outputs(exact(read_saved(path, given=given)), boards + 1)
    close(got[..., 2:], s4nj1th_digits(weights, boards, asked or semantics, 2, 3))
    assert (got[..., :2] < -1e3).all()
    if asked is None:
        assert main([str(path), str(tmp_path / "run")]) == 0
        assert main([str(tmp_path / "run"), str(tmp_path / "b.pt"), "--to=s4nj1th"]) == 0
        back = torch.load(tmp_path / "b.pt", weights_only=True)
        assert back["config"] == {**settings, "input_dim": 810, "output_dim": 729, "L_layers": 3}
        assert back["model_state_dict"].keys() == weights.keys()
        assert all(torch.equal(back["model_state_dict"][n], v) for n, v in weights.items())


def test_s4nj1th_without_config_or_with_odd_gates(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"model_state_dict": s4nj1th_weights((1,))}, path)
    with pytest.raises(ValueError, match="holds no config: --H-cycles N, --L-cycles N"):
        read_foreign(path)
    assert read_foreign(path, given=CYCLES).settings["H_cycles"] == H_CYCLES
    torch.save({"model_state_dict": s4nj1th_weights((12,)), "config": {}}, path)
    with pytest.raises(ValueError, match="of neither version: one number each"):
        read_foreign(path)
