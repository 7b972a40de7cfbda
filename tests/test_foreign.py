"""Files of other projects: told apart, read, run as their own code would, and written back."""

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign_models import (
    H_CYCLES,
    HEADS,
    L_CYCLES,
    D,
    lucidrains_outputs,
    lucidrains_weights,
    nano_outputs,
    nano_weights,
    rs_logits,
    rs_weights,
    s4nj1th_weights,
)

from trm_fast.convert import main
from trm_fast.foreign import read_foreign
from trm_fast.inference import predict
from trm_fast.pretrained import build, read_saved

CYCLES = {"H_cycles": H_CYCLES, "L_cycles": L_CYCLES}


def outputs(model, tokens, puzzles=None, steps=1):
    """(logits, halting logits) after `steps` supervision steps, as float64 NumPy."""
    puzzles = torch.zeros(len(tokens), dtype=torch.int32) if puzzles is None else puzzles
    batch = {"inputs": tokens.int(), "puzzle_identifiers": puzzles}
    with torch.no_grad():
        carry = model.initial_carry(batch)
        for _ in range(steps):
            carry, out = model(carry, batch)
            carry.halted.zero_()
    return out["logits"].double().numpy(), out["q_halt_logits"].double().numpy()


def exact(saved, weights=None):
    """The model in float64, so that a recursion does not make rounding large."""
    saved.config["model"]["forward_dtype"] = "float64"
    return build(saved, weights)[0]


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.abs(want).max() > 0.1  # not by being nothing


def rs_file(tmp_path, **changes):
    path = tmp_path / "checkpoint_step_40.safetensors"
    safetensors.torch.save_file(rs_weights(**changes), path)
    return path


TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 0, 1, 2], [6, 5, 4, 3, 2, 1, 0, 0, 1]])
RS = {**CYCLES, "num_heads": HEADS, "seq_len": 9}


@pytest.mark.parametrize("start", ["zeros", "init"])
def test_rs_weights_compute_what_the_rust_code_computes(tmp_path, start):
    path = rs_file(tmp_path)
    saved = read_saved(path, given={**RS, "carry": start})
    assert saved.config["model"]["forward_dtype"] == "float32"
    model = exact(saved)
    got, q = outputs(model, TOKENS)
    close(got, rs_logits(rs_weights(), TOKENS, start))
    assert (q == -5).all() and saved.step == 40
    assert model.config.halt_max_steps == 1
    # One supervision step is what its code calls a forward: predict runs no more of them.
    answers = predict(model, TOKENS.int(), steps=model.config.halt_max_steps)
    assert torch.equal(answers.tokens.long(), torch.from_numpy(got).argmax(-1))


def test_rs_asks_for_what_its_files_do_not_hold(tmp_path):
    path = rs_file(tmp_path)
    for lacking in RS:
        given = {k: v for k, v in RS.items() if k != lacking}
        flag = "--" + lacking.replace("_", "-")
        with pytest.raises(ValueError, match=rf"does not hold {lacking}: {flag} N"):
            read_foreign(path, given=given)
    with pytest.raises(ValueError, match="hold H_cycles, L_cycles, num_heads, seq_len") as caught:
        read_foreign(path)
    assert "\n" not in str(caught.value)


def test_rs_networks_that_are_not_ours_are_refused(tmp_path):
    weights = {k: v for k, v in rs_weights().items() if "self_attn" not in k}
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(weights, path)
    with pytest.raises(ValueError, match="mlp_t=true, which in tiny-recursive-rs only drops"):
        read_foreign(path, given=RS)
    with pytest.raises(ValueError, match=r"another vocabulary in lm_head"):
        read_foreign(rs_file(tmp_path, **{"lm_head.weight": (5, D)}), given=RS)
    with pytest.raises(ValueError, match=r"lacks what becomes H_init"):
        safetensors.torch.save_file({k: v for k, v in rs_weights().items() if k != "h_init"}, path)
        read_foreign(path, given=RS)


def test_rs_there_and_back(tmp_path, capsys):
    path = rs_file(tmp_path)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in RS.items()]
    run, back = tmp_path / "run", tmp_path / "out" / "final_model.safetensors"
    assert main([str(path), str(run), "--carry=init", *flags]) == 0
    assert main([str(run), str(back), "--to=rs"]) == 0
    written = safetensors.torch.load_file(back)
    assert written.keys() == rs_weights().keys()
    assert all(torch.equal(written[k], v) for k, v in rs_weights().items())
    # What its own files never say stands beside ours.
    again = read_foreign(back, given={"carry": "init"})
    assert {k: again.config[k] for k in RS} == RS
    assert "(rs)" in capsys.readouterr().out


def nano_document(sudoku=False, mlp=False, prefix=0, **changes):
    length = 16 if sudoku else 9
    tokens = length + prefix if mlp else None
    weights = nano_weights(7, tokens, prefix)
    names = [n for n in weights if not n.startswith(("z_", "puzzle_emb"))]
    shadow = {n: weights[n] * 0.5 for n in names}
    hyper = {
        **{"hidden_size": D, "num_layers": 2, "num_heads": HEADS, "H_cycles": H_CYCLES},
        **{"L_cycles": L_CYCLES, "N_supervision": 4, "N_supervision_val": 4, "ffn_expansion": 4},
        **{"halt_exploration_prob": 0.1, "rope_theta": 10000, "use_mlp_t": mlp},
        **{"pos_emb_type": "null" if mlp else "1d", "puzzle_emb_len": prefix},
        **{"puzzle_emb_dim": D + 3 if prefix else 0, "vocab_size": 7, "num_puzzles": 3},
        **{"batch_size": 2, "seq_len": length, "forward_dtype": torch.float32},
    }
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.5.5",
        "state_dict": weights,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val/loss'}": {"best_model_score": torch.tensor(0.5)},
            "EMACallback": {"shadow": shadow, "decay": 0.999},
        },
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {**hyper, **changes},
    }


def averaged(document):
    return document["state_dict"] | document["callbacks"]["EMACallback"]["shadow"]


@pytest.mark.parametrize(
    "case", [{}, {"prefix": 2}, {"mlp": True}, {"mlp": True, "prefix": 2}], ids=str
)
@pytest.mark.parametrize("which", ["raw", "ema"])
def test_nano_trm_checkpoints_compute_what_its_code_computes(tmp_path, case, which):
    document = nano_document(**case)
    torch.save(document, tmp_path / "last.ckpt")
    saved = read_saved(tmp_path / "last.ckpt")
    model = exact(saved, which)
    assert (saved.step, model.config.q_logits) == (120, 1)
    puzzles = torch.tensor([2, 1])
    weights = document["state_dict"] if which == "raw" else averaged(document)
    got = outputs(model, TOKENS, puzzles.int(), steps=2)
    want = nano_outputs(weights, TOKENS, puzzles, case.get("prefix", 0), steps=2)
    close(got[0], want[0])
    close(got[1], want[1])


def test_nano_trm_sudoku_tokens_are_one_lower_here(tmp_path):
    document = nano_document(sudoku=True)
    torch.save(document, tmp_path / "last.ckpt")
    theirs = torch.tensor([[0, 2, 3, 4, 5, 6, 2, 2] * 2])
    ours = theirs - (theirs > 1).int()
    model = exact(read_saved(tmp_path / "last.ckpt"), "raw")
    want, _ = nano_outputs(document["state_dict"], theirs, torch.zeros(1).long(), 0, 1)
    close(outputs(model, ours)[0], np.delete(want, 1, axis=-1))
    assert model.config.vocab_size == 6
    kept = exact(read_saved(tmp_path / "last.ckpt", given={"keep_tokens": True}), "raw")
    close(outputs(kept, theirs)[0], want)


@pytest.mark.parametrize("case", [{"sudoku": True}, {"mlp": True, "prefix": 2}], ids=str)
def test_nano_trm_there_and_back(tmp_path, case):
    document = nano_document(**case)
    torch.save(document, tmp_path / "a.ckpt")
    assert main([str(tmp_path / "a.ckpt"), str(tmp_path / "run")]) == 0
    assert main([str(tmp_path / "run"), str(tmp_path / "b.ckpt"), "--to=nano-trm"]) == 0
    back = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert back["global_step"] == 120
    for name, value in document["hyper_parameters"].items():
        # The width of the board; how it was cast.
        if name not in ("max_grid_size", "forward_dtype"):
            assert back["hyper_parameters"][name] == value, name
    found = {"raw": back["state_dict"], "ema": back["callbacks"]["EMACallback"]["shadow"]}
    first = {"raw": document["state_dict"], "ema": document["callbacks"]["EMACallback"]["shadow"]}
    for kind, weights in first.items():
        assert found[kind].keys() == weights.keys()
        for name, value in weights.items():
            got = found[kind][name]
            if case.get("sudoku") and len(value) == 7:  # the row of the token that none has
                got, value = (torch.cat((t[:1], t[2:])) for t in (got, value))
            assert torch.equal(got, value), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pos_emb_type": "2d"}, "two-dimensional rotary positions"),
        ({"seq_len": 10**9}, "seq_len is 1000000000; up to 1000000 is allowed"),
        ({"H_cycles": 10**9}, "H_cycles is 1000000000; up to 10000"),
        ({"num_heads": 3}, "hidden_size must be a multiple of num_heads"),
        ({"ffn_expansion": "much"}, "expansion must be a number above 0|expansion must be"),
        ({"seq_len": None}, "seq_len must be an integer"),
    ],
)
def test_nano_trm_settings_that_are_not_ours(tmp_path, changes, said):
    torch.save(nano_document(**changes), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=f"(?s){said}") as caught:
        build(read_saved(tmp_path / "last.ckpt"))
    assert "\n" not in str(caught.value)


def test_nano_trm_convolutions_are_refused(tmp_path):
    document = nano_document()
    document["state_dict"]["lenet.layers.0.mlp.dwconv.weight"] = torch.zeros(4, 1, 3)
    torch.save(document, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"convolutional feed-forward layers .*dwconv"):
        read_foreign(tmp_path / "last.ckpt")


def test_lucidrains_with_a_network_like_ours(tmp_path):
    weights = lucidrains_weights()
    torch.save(weights, tmp_path / "saved-trm.pt")
    model = exact(read_saved(tmp_path / "saved-trm.pt", given=RS))
    got, want = outputs(model, TOKENS, steps=2), lucidrains_outputs(weights, TOKENS, steps=2)
    close(got[0], want[0])
    close(got[1], want[1])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("network.layers.0.0.0.gamma", "an x-transformers stack"),
        ("network.0.0.fn.0.weight", "MLPMixer1D"),
    ],
)
def test_lucidrains_networks_of_its_own_are_refused(tmp_path, name, said):
    weights = {k: v for k, v in lucidrains_weights().items() if not k.startswith("network.")}
    torch.save({**weights, name: torch.ones(D)}, tmp_path / "saved-trm.pt")
    with pytest.raises(ValueError, match=f"its network is {said} "):
        read_foreign(tmp_path / "saved-trm.pt", given=RS)
    del weights["to_pred.weight"]
    torch.save({**weights, **lucidrains_weights()} | {"to_pred.weight": 1}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="'to_pred.weight' is not a tensor"):
        read_foreign(tmp_path / "odd.pt", given=RS)


# s4nj1th: read; its network is another one


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


def test_s4nj1th_without_config_or_with_odd_gates(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"model_state_dict": s4nj1th_weights((1,))}, path)
    with pytest.raises(ValueError, match="holds no config: --H-cycles N, --L-cycles N"):
        read_foreign(path)
    assert read_foreign(path, given=CYCLES).settings["H_cycles"] == H_CYCLES
    torch.save({"model_state_dict": s4nj1th_weights((12,)), "config": {}}, path)
    with pytest.raises(ValueError, match=r"of neither version: --semantics v1\|head"):
        read_foreign(path)


# What is of no format, or of another one


def test_files_of_no_format(tmp_path):
    path = tmp_path / "m.pt"
    for content, said in (
        ({"a.weight": torch.ones(2)}, "of no known format .* first names are a.weight"),
        ({}, "holds no weights: it is empty"),
        ({"state_dict": {"a": 1}}, "'a' is not a tensor"),
        ([1], "holds a list; a dict was expected"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"m\.pt: .*{said}") as caught:
            read_foreign(path)
        assert "\n" not in str(caught.value)
    torch.save(lucidrains_weights(), path)
    with pytest.raises(ValueError, match="names are those of lucidrains, not of nano-trm"):
        read_foreign(path, "nano-trm", given=RS)
    with pytest.raises(ValueError, match="format is 'onnx'; auto, official, hrm"):
        read_foreign(path, "onnx")
