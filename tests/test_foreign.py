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
from tiny import tiny_model

from trm_fast.convert import main
from trm_fast.foreign import read_foreign
from trm_fast.inference import predict
from trm_fast.interop import write_official
from trm_fast.pretrained import build, read_saved, save_pretrained

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
    answers = predict(model, TOKENS.int(), depth=model.config.halt_max_steps)
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


def doubled(depth):
    """A tuple of itself twice, and so on: small in a file, without end as text."""
    value = ()
    for _ in range(depth):
        value = (value, value)
    return value


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
        ({"seq_len": 10**9}, "seq_len is larger than any such model's: 1000000000, up to 1000000"),
        ({"H_cycles": 10**9}, "H_cycles is larger than any .*: 1000000000, up to 10000"),
        ({"num_heads": 3}, "hidden_size / num_heads must be even for rope, got 5"),
        (
            {"num_heads": 5, "pos_emb_type": "null"},
            r"qkv_proj.weight is \[48, 16\], this model has",
        ),
        ({"ffn_expansion": "much"}, "expansion must be a number above 0|expansion must be"),
        ({"seq_len": None}, "seq_len must be an integer"),
        ({"H_cycles": doubled(60)}, r"H_cycles must be an integer >= 1, got \(\("),
        ({"ffn_expansion": doubled(60)}, r"expansion must be a number above 0, got \(\("),
        ({"H_cycles": 3000, "L_cycles": 3000}, "H_cycles . L_cycles . halt_max_steps is larger"),
    ],
)
def test_nano_trm_settings_that_are_not_ours(tmp_path, changes, said):
    torch.save(nano_document(**changes), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=f"(?s){said}") as caught:
        build(read_saved(tmp_path / "last.ckpt"))
    assert "\n" not in str(caught.value)


def test_nano_trm_settings_are_ours_by_other_names(tmp_path):
    said = {"rope_theta": 500.0, "halt_exploration_prob": 0.3, "N_supervision": 7}
    torch.save(nano_document(**said), tmp_path / "last.ckpt")
    config = build(read_saved(tmp_path / "last.ckpt"))[0].config
    found = (config.rope_theta, config.halt_exploration_prob, config.halt_max_steps)
    assert found == (500.0, 0.3, 7)


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


# Official files: five networks, every prefix

NETWORKS = {
    "trm": {},
    "trm-mlp": {"mlp_t": True, "pos_encodings": "none"},
    "trm-learned": {"pos_encodings": "learned", "puzzle_emb_ndim": 0, "puzzle_emb_len": 0},
    "trm_singlez": {"name": "trm_singlez"},
    "trm_hier6": {"name": "trm_hier6"},
    "hrm": {"name": "hrm", "H_layers": 2, "puzzle_emb_len": 0},
    "transformers_baseline": {"name": "transformers_baseline", "H_layers": 2, "L_cycles": 1}
    | {"H_cycles": 1, "puzzle_emb_len": 0},
}
OFFICIAL = {"expansion": 4.0, "intermediate_multiple": 256, "forward_dtype": "bfloat16"}
ASK = {"H_cycles": 2, "L_cycles": 2, "num_heads": 2, "seq_len": 10, "puzzle_emb_len": 2}


def same_model(got, want):
    for name, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name
    assert got.state_dict().keys() == want.state_dict().keys()
    tokens = torch.arange(20).view(2, 10) % 9
    for a, b in zip(outputs(got, tokens), outputs(want.eval(), tokens), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("network", NETWORKS)
def test_official_files_of_every_network(tmp_path, network):
    model = tiny_model(**{**OFFICIAL, **NETWORKS[network]})
    write_official(tmp_path / "step_7", model.state_dict())
    given = dict(ASK)
    if model.config.puzzle_emb_ndim == 0 or model.config.kind in ("hrm", "transformers_baseline"):
        del given["puzzle_emb_len"]
    saved = read_saved(tmp_path / "step_7", given=given)
    got, chosen = build(saved)
    assert (got.config.kind, chosen, saved.step) == (model.config.kind, "raw", 7)
    same_model(got, model)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.model.inner.", "model.inner.", "_orig_mod.inner.", "inner.", ""]
)
def test_official_files_under_every_prefix(tmp_path, prefix):
    model = tiny_model(**OFFICIAL)
    write_official(tmp_path / "pytorch_model.bin", model.state_dict(), prefix)
    same_model(build(read_saved(tmp_path / "pytorch_model.bin", given=ASK))[0], model)


@pytest.mark.parametrize("network", NETWORKS)
def test_official_there_and_back_with_the_settings_beside_it(tmp_path, capsys, network):
    model = tiny_model(**{**OFFICIAL, **NETWORKS[network]})
    save_pretrained(model, tmp_path / "mine")
    theirs = tmp_path / "theirs" / "step_30"
    assert main([str(tmp_path / "mine"), str(theirs), "--to=official"]) == 0
    written = torch.load(theirs, weights_only=True)
    assert written.keys() == {"_orig_mod.model." + name for name in model.state_dict()}
    # The official code says its data elsewhere: only the length of a board is still asked for.
    command = [str(theirs), str(tmp_path / "run"), "--from=official"]
    if not model.config.mlp_t and model.config.pos_encodings != "learned":
        assert main(command) == 3
        assert "does not hold seq_len: --seq-len N (81 for" in capsys.readouterr().err
    assert main([*command, "--seq-len=10"]) == 0
    saved = read_saved(tmp_path / "run")
    assert saved.step == 30 and saved.place == tmp_path / "run" / "step_30"
    got, _ = build(saved)
    same_model(got, model)
    for key, value in model.config.to_dict().items():
        # Without rows or attention the file does not say how many.
        silent = {"num_puzzle_identifiers": model.config.puzzle_emb_ndim == 0, "num_heads": True}
        if key not in ("batch_size", "policy", "puzzle_emb_len") and not silent.get(key):
            assert got.config.to_dict()[key] == value, key
    assert got.config.prefix_len == model.config.prefix_len
    assert main([str(tmp_path / "mine"), str(theirs), "--to=official"]) == 0
    assert "all_config.yaml is left as it is" in capsys.readouterr().err


def test_official_sizes_follow_from_shapes_and_flags_go_first(tmp_path):
    model = tiny_model(mlp_t=True, pos_encodings="none", puzzle_emb_len=3)
    write_official(tmp_path / "step_7", model.state_dict())
    foreign = read_foreign(tmp_path / "step_7", given={**CYCLES, "seq_len": 10})
    expected = {"puzzle_emb_len": 3, "seq_len": 10, "intermediate_size": 24, **CYCLES}
    assert {k: foreign.config[k] for k in expected} == expected
    assert foreign.config["token_intermediate_size"] == model.config.token_width
    with pytest.raises(ValueError, match="has 13 tokens, no more than the 16 of the prefix"):
        read_foreign(tmp_path / "step_7", given=CYCLES)
    (tmp_path / "all_config.yaml").write_text(
        "arch: {H_cycles: 5, L_cycles: 4, puzzle_emb_len: 3, loss: {loss_type: x}, other: 1}"
    )
    found = read_foreign(tmp_path / "step_7", given={"H_cycles": 6})
    assert (found.config["H_cycles"], found.config["L_cycles"]) == (6, 4)
    assert (found.config["seq_len"], found.settings["loss_type"]) == (10, "x")


# A list of itself twice, sixty times: as text it has no end.
ENDLESS = "a0: &a0 [1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60))
ENDLESS += "arch: {H_cycles: *a60}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arch: 1", "has no arch with settings in it"),
        ("[1]", "must hold keys and values"),
        ("arch: {expansion: [1]}", r"arch.expansion must be one value, got \[1\]"),
        ("arch: {puzzle_emb_len: many}", "puzzle_emb_len must be a whole number, got 'many'"),
        (ENDLESS, r"arch.H_cycles must be one value, got \[\[\["),
        ("arch: {expansion: much}", "expansion must be a number above 0, got 'much'"),
        ("arch: !!python/object/apply:os.system ['touch owned']", "is not YAML"),
        pytest.param("#" * 2_000_000, "larger than 262144 bytes", id="large"),
    ],
)
def test_official_settings_that_cannot_be_used(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path / "step_7", tiny_model(**OFFICIAL).state_dict())
    (tmp_path / "all_config.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_foreign(tmp_path / "step_7", given={k: v for k, v in ASK.items() if "emb" not in k})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_official_networks_are_told_apart(tmp_path):
    write_official(tmp_path / "step_7", tiny_model(**OFFICIAL).state_dict())
    with pytest.raises(ValueError, match="is of the official network trm, not of hrm"):
        read_foreign(tmp_path / "step_7", "hrm", given=ASK)
    hrm = tiny_model(**{**OFFICIAL, **NETWORKS["hrm"]})
    write_official(tmp_path / "checkpoint", hrm.state_dict(), "_orig_mod.model.inner.")
    assert read_foreign(tmp_path / "checkpoint", "hrm", given=ASK).arch == "hrm"


@pytest.mark.parametrize(
    ("changes", "to", "said"),
    [
        ({}, "official", "its inner widths are multiples of 256 by one expansion, not 24"),
        ({**OFFICIAL, "q_readout": "mean"}, "official", "q_readout there is first, this model has"),
        ({**OFFICIAL, "puzzle_emb_ndim": 0}, "official", "prefix needs puzzle rows"),
        (OFFICIAL, "rs", "prefix_len there is 0, this model has 2"),
        ({**OFFICIAL, "mlp_t": True, "pos_encodings": "none"}, "rs", "mlp_t there is False"),
        ({**OFFICIAL, **NETWORKS["hrm"]}, "rs", "it has the network trm only, this model is hrm"),
        ({**OFFICIAL, "pos_encodings": "learned"}, "nano-trm", "pos_encodings there is rope or no"),
        ({**OFFICIAL, "rms_norm_eps": 1e-6}, "nano-trm", "rms_norm_eps there is 1e-05"),
        ({**OFFICIAL, **NETWORKS["trm_hier6"]}, "nano-trm", "this model is trm_hier6"),
        ({}, "lucidrains", "its networks are MLPMixer1D and x-transformers"),
        ({}, "s4nj1th", "it holds gated residual MLPs, this model is trm"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, capsys, changes, to, said):
    save_pretrained(tiny_model(**changes), tmp_path / "mine")
    target = tmp_path / "out" / "x.safetensors"
    assert main([str(tmp_path / "mine"), str(target), f"--to={to}"]) == 3
    error = capsys.readouterr().err
    assert f"cannot be written as {to}: " in error and said in error
    assert error.count("\n") == 1 and not target.parent.exists()


# What is of no format, or of another one


def test_official_settings_are_for_official_files(tmp_path):
    torch.save(nano_document(), tmp_path / "last.ckpt")
    (tmp_path / "all_config.yaml").write_text("arch: {rms_norm_eps: 0.5}")
    alone = read_foreign(tmp_path / "last.ckpt")
    assert "rms_norm_eps" not in alone.config and alone.notes == []
    asked = read_foreign(tmp_path / "last.ckpt", config=tmp_path / "all_config.yaml")
    assert asked.config["rms_norm_eps"] == 0.5
    assert asked.notes == [f"settings are those of {tmp_path / 'all_config.yaml'}"]
    torch.save({"model_state_dict": s4nj1th_weights((1,))}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"s4nj1th, for which no all_config.yaml says anything"):
        read_foreign(tmp_path / "m.pt", config=tmp_path / "all_config.yaml")


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
