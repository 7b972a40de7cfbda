"""The gated residual MLP against recorded values of the original; its options; its training."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from config_errors import message
from golden.compare import HERE, tensors_of
from golden.s4nj1th import SETTINGS, fill, puzzles, state_digests
from parity import relative_l2
from tiny import HeldStorages
from torch.utils.flop_counter import FlopCounterMode

from trm_fast import optim, runner
from trm_fast.config import ModelConfig, TrainConfig, from_preset
from trm_fast.data.format import DataError
from trm_fast.data.sudoku import split_of_csv
from trm_fast.data.sudoku_generator import generate
from trm_fast.flops import step_flops
from trm_fast.gated_mlp import _log_odds
from trm_fast.loading import load
from trm_fast.losses import ACTLossHead, constraint_loss
from trm_fast.memory import _gated_elements, parameter_count
from trm_fast.model import Model
from trm_fast.overrides import parse_train

RECORDED = json.loads((HERE / "s4nj1th.json").read_text())


def gated(**changes):
    values = {
        "name": "gated_mlp",
        "batch_size": 5,
        "seq_len": 81,
        "vocab_size": 11,
        "num_puzzle_identifiers": 1,
        "hidden_size": SETTINGS["hidden_dim"],
        "L_layers": SETTINGS["L_layers"],
        "H_cycles": SETTINGS["H_cycles"],
        "L_cycles": SETTINGS["L_cycles"],
        "policy": "save",
    }
    return Model(values | changes)


def board_batch():
    clues, digits = puzzles()
    identifiers = torch.zeros(len(clues), dtype=torch.int32)
    tokens = {"inputs": clues + 1, "labels": digits + 1}
    return {name: t.int() for name, t in tokens.items()} | {"puzzle_identifiers": identifiers}


def trained_once(model, weight=0.1, boxes=False):
    """Outputs, metrics and gradients of one step."""
    head = ACTLossHead(model, "softmax_cross_entropy", weight, boxes).train()
    batch = board_batch()
    _, loss, metrics, outputs, halted = head(
        ["logits", "q_halt_logits"], head.initial_carry(batch), batch
    )
    assert halted
    (loss / len(batch["inputs"])).backward()
    return outputs, metrics, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("policy", ["save", "light", "recompute"])
@pytest.mark.parametrize("semantics", ["v1", "head"])
def test_answers_losses_and_gradients_are_those_of_the_original(semantics, policy):
    model = gated(semantics=semantics, policy=policy)
    fill(model, "inner.")
    outputs, metrics, grads = trained_once(model)
    want = tensors_of("s4nj1th")
    assert relative_l2(outputs["logits"][..., 2:], want[f"{semantics}/logits"]) < 1e-5
    assert (outputs["logits"][..., :2] == -1e4).all()
    losses = torch.stack([metrics["lm_loss"], metrics["constraint_loss"]]) / 5
    torch.testing.assert_close(losses, want[f"{semantics}/losses"], rtol=1e-5, atol=1e-7)
    for name, grad in grads.items():
        error = relative_l2(grad, want[f"{semantics}/grad/{name.removeprefix('inner.')}"])
        assert error < 2e-5, (name, error)


@pytest.mark.parametrize("semantics", ["v1", "head"])
def test_initial_weights_of_a_seed_are_those_of_the_original(semantics):
    torch.manual_seed(0)
    model = gated(semantics=semantics)
    assert state_digests(model.inner.state_dict()) == RECORDED[semantics]["initial"]
    assert sum(p.numel() for p in model.parameters()) == RECORDED[semantics]["parameters"]


def test_the_notebooks_model_has_as_many_parameters_as_its_log_says():
    config = from_preset("gated-mlp").arch.model_config(
        batch_size=64, seq_len=81, vocab_size=11, num_puzzle_identifiers=1
    )
    assert parameter_count(config) == 13_393_627


OPTIONS = [{}, {"vector_gates": True}, {"cell_attention": True, "num_heads": 2}]


@pytest.mark.parametrize("semantics", ["v1", "head"])
@pytest.mark.parametrize("options", OPTIONS)
def test_counts_are_those_of_the_model(options, semantics):
    model = gated(**options, semantics=semantics)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())
    batch = board_batch()
    carry = model.train().initial_carry(batch)
    with FlopCounterMode(display=False) as counter:
        model(carry=carry, batch=batch)[1]["logits"].sum().backward()
    # Attention's core is counted with its scores made again, and on CPUs perhaps not at all.
    tolerance = 0.2 if options.get("cell_attention") else 0.03
    useful = step_flops(model.config, "train")
    first_input = 2 * 5 * 81 * 10 * 16  # one-hot boards have no gradient
    assert counter.get_total_flops() == pytest.approx(useful - first_input, rel=tolerance)


@pytest.mark.parametrize("semantics", ["v1", "head"])
def test_equal_vector_gates_are_a_scalar_one(semantics):
    scalar, vector = (gated(semantics=semantics, vector_gates=v) for v in (False, True))
    fill(scalar)
    state = {
        name: value.expand(16) if name.endswith("_gate") else value
        for name, value in scalar.state_dict().items()
    }
    vector.load_state_dict(state)
    one, _, whole = trained_once(scalar)
    other, _, each = trained_once(vector)
    torch.testing.assert_close(one["logits"], other["logits"])
    for name in ("inner.latent_gate", "inner.output_gate"):
        assert each[name].shape == (16,)
        torch.testing.assert_close(each[name].sum(), whole[name].sum(), rtol=1e-4, atol=1e-6)


def test_cells_attend_to_each_other_and_nothing_else_mixes_them():
    model = gated(cell_attention=True, num_heads=4).eval()
    batch = board_batch()
    other = {**batch, "inputs": batch["inputs"].clone()}
    other["inputs"][:, 7] = batch["inputs"][:, 7] % 10 + 1

    def logits(batch):
        with torch.no_grad():
            return model(carry=model.initial_carry(batch), batch=batch)[1]["logits"]

    changed = (logits(batch) != logits(other)).any(-1)
    assert changed.float().mean() > 0.9
    for attention in model.inner.latent_attention:
        torch.nn.init.zeros_(attention.o_proj.weight)
        torch.nn.init.zeros_(attention.o_proj.bias)
    changed = (logits(batch) != logits(other)).any(-1)
    assert changed[:, 7].all() and changed.sum() == len(changed)


@pytest.mark.parametrize("options", OPTIONS)
def test_an_empty_batch(options):
    model, batch = gated(**options).eval(), {n: t[:0] for n, t in board_batch().items()}
    _, outputs = model(carry=model.initial_carry(batch), batch=batch)
    assert outputs["logits"].shape == (0, 81, 11) and outputs["q_halt_logits"].shape == (0,)


def test_dropout_of_a_recomputed_pass_is_that_of_the_forward():
    grads = []
    for policy in ("save", "recompute"):
        model = gated(dropout=0.5, policy=policy)
        fill(model)
        torch.manual_seed(3)
        grads.append(trained_once(model)[2])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("policy", ["save", "recompute"])
def test_what_the_backward_keeps_is_what_the_estimate_says(options, policy):
    model, batch = gated(**options, policy=policy).train(), board_batch()
    carry = model.initial_carry(batch)
    with HeldStorages([*model.parameters(), *batch.values()]) as held:
        _, outputs = model(carry=carry, batch=batch)
        kept = held.held_bytes(but=outputs.values())
    estimate = 4 * 5 * _gated_elements(model.config, policy)
    # Passes that are made again hold a pass of blocks more, then.
    least = 0.8 if policy == "save" else 0.1
    assert least * estimate < kept < 1.05 * estimate


def test_q_is_the_log_odds_of_all_cells_being_right():
    model = gated()
    fill(model)
    outputs, _, _ = trained_once(model)
    p = outputs["logits"].double().softmax(-1).amax(-1).prod(-1)
    torch.testing.assert_close(outputs["q_halt_logits"].double(), torch.logit(p), rtol=1e-5, atol=0)
    assert outputs["q_halt_logits"].isfinite().all()
    # Where it is nearly sure the odds are not the probability.
    logits = torch.zeros(1, 4, 9)
    logits[..., 3] = 12.0
    p = logits.double().softmax(-1)[0, 0, 3] ** 4
    torch.testing.assert_close(_log_odds(logits)[0].double(), torch.logit(p), rtol=2e-3, atol=0)


def sure(grid):
    """Logits that leave no doubt about a grid of digits."""
    side = len(grid)
    tokens = torch.tensor(grid).flatten() + 1
    return 40.0 * F.one_hot(tokens, side + 2).float().unsqueeze(0)


def test_constraint_loss_by_hand():
    right = [[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]
    assert constraint_loss(sure(right)).item() == pytest.approx(0, abs=1e-6)
    assert constraint_loss(torch.zeros(2, 81, 11)).tolist() == pytest.approx([0, 0], abs=1e-6)
    rows = [[1, 2, 3, 4]] * 4  # columns hold a digit four times, boxes two digits twice
    assert constraint_loss(sure(rows), boxes=False).item() == pytest.approx(12 / 16)
    assert constraint_loss(sure(rows)).item() == pytest.approx(12 / 16 + 8 / 16)
    one = [[1, 1, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]  # a row, a column and a box
    assert constraint_loss(sure(one)).item() == pytest.approx(3 / 16)
    with pytest.raises(ValueError, match="16 cells have 6 token values, not 7"):
        constraint_loss(torch.zeros(1, 16, 7))
    with pytest.raises(ValueError, match="not supported: 4x4, 6x6 or 9x9"):
        constraint_loss(torch.zeros(1, 25, 7))


def test_constraint_loss_of_boxes_that_are_not_square():
    grid = np.array([[(3 * (r % 2) + r // 2 + c) % 6 + 1 for c in range(6)] for r in range(6)])
    assert constraint_loss(sure(grid.tolist())).item() == pytest.approx(0, abs=1e-6)
    swapped = grid[[2, 1, 0, 3, 4, 5]]  # rows of two bands: only boxes break
    assert constraint_loss(sure(swapped.tolist()), boxes=False).item() == pytest.approx(0, abs=1e-6)
    assert constraint_loss(sure(swapped.tolist())).item() > 0.1


def test_what_decays():
    config = TrainConfig.from_dict(
        {"optimizer": "adamw", "weight_decay": 0.3, "weight_decay_on": "matrices"}
    )
    model = gated(vector_gates=True)
    ((optimizer, _),) = optim.build_optimizers(model, config)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.3 if p.ndim == 2 else 0.0), name
    ((optimizer, _),) = optim.build_optimizers(model, config.replace({"weight_decay_on": "all"}))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]
    wanted = "weight_decay_on=matrices needs optimizer=adamw, got muon"
    assert message(config.replace, {"optimizer": "muon"}) == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"puzzle_emb_ndim": 4}, "gated_mlp needs puzzle_emb_ndim=0, got 4"),
        ({"halt_max_steps": 2}, "gated_mlp needs halt_max_steps=1, got 2"),
        ({"mlp_t": True}, "gated_mlp needs mlp_t=false, got True"),
        ({"quantize": "int8"}, "gated_mlp needs quantize=none, got int8"),
        (
            {"cell_attention": True, "num_heads": 3},
            "cell_attention needs hidden_size to be a multiple of num_heads, got 16 and 3",
        ),
        ({"semantics": "v2"}, "semantics must be one of head, v1, got 'v2'"),
    ],
)
def test_what_it_does_not_have(changes, wanted):
    values = {"name": "gated_mlp", "batch_size": 1, "seq_len": 81, "vocab_size": 11}
    values |= {"num_puzzle_identifiers": 1, "H_cycles": 1, "L_cycles": 1, "L_layers": 1}
    assert message(ModelConfig.from_dict, values | {"hidden_size": 16} | changes) == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    model, exact = gated(forward_dtype=dtype), gated()
    fill(model)
    fill(exact)
    got, _, grads = trained_once(model)
    want, _, _ = trained_once(exact)
    assert relative_l2(got["logits"][..., 2:], want["logits"][..., 2:]) < 0.02
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())


@pytest.fixture
def csv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    boards, grids = generate(120, clues=(8, 12), size=4, seed=3)
    rows = [
        "".join(map(str, b)) + "," + "".join(map(str, g))
        for b, g in zip(boards, grids, strict=True)
    ]
    path = tmp_path / "sudoku.csv"
    path.write_text("quizzes,solutions\n" + "\n".join(rows) + "\n")
    return path


def test_a_run_from_a_csv_and_its_answers(csv, capsys):
    keys = "steps=30 eval_steps=30 arch.hidden_size=16 arch.L_layers=1 arch.H_cycles=1 device=cpu"
    config = parse_train(["preset=gated-mlp", "data_paths=sudoku.csv", *keys.split()])
    config = config.replace(
        {"global_batch_size": 16, "lr": 1e-2, "run_name": "r", "log_interval": 1}
    )
    assert runner.train(config) == 0
    out = capsys.readouterr().out
    assert "of sudoku.csv" in out and "plain PyTorch" in out
    (folder,) = csv.parent.glob("data/sudoku-*")
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    (run,) = csv.parent.glob("checkpoints/*/r")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/lm_loss"] for row in rows if "train/lm_loss" in row]
    assert len(losses) == 30 and losses[-1] < 0.7 * losses[0]
    assert all("train/constraint_loss" in row for row in rows if "train/lm_loss" in row)
    loaded = load(run)
    assert loaded.model.config.kind == "gated_mlp" and loaded.model.config.seq_len == 16
    assert split_of_csv("sudoku.csv", "data") == folder.relative_to(csv.parent)
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp


def test_a_changed_csv_is_other_data_and_damage_is_seen(csv):
    first = split_of_csv(csv, "data")
    lines = csv.read_text().splitlines()
    csv.write_text("\n".join(lines[:-10]) + "\n")
    assert split_of_csv(csv, "data") != first
    csv.write_text("\n".join(lines) + "\n")
    (first / "train" / "all__inputs.npy").write_bytes(b"")
    with pytest.raises(DataError, match="missing or damaged; remove"):
        split_of_csv(csv, "data")
    with pytest.raises(DataError, match=r"no\.csv: No such file"):
        split_of_csv("no.csv", "data")


def test_gates_begin_where_the_original_has_them():
    assert gated().inner.latent_gate.sigmoid().item() == 0.5
    assert gated(semantics="v1").inner.output_gate.tolist() == [1.0]
    assert math.isclose(gated(vector_gates=True).inner.latent_gate.sigmoid().mean().item(), 0.5)
