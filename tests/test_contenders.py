"""Ways to run a step: built with equal weights, compared, and refused where they differ."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from capturing import Recorded
from torch.utils.flop_counter import FlopCounterMode

from trm_fast import backends
from trm_fast import contenders as contending
from trm_fast.backends import Choice
from trm_fast.contenders import (
    Contender,
    ParityError,
    check_parity,
    compare,
    contenders,
    effective_config,
    fused,
    make_batch,
    make_carry,
    outcome,
    prepare,
)
from trm_fast.floor import matmuls
from trm_fast.flops import step_flops
from trm_fast.official import Fields, official_code
from trm_fast.workloads import CASES, quick

CPU = torch.device("cpu")
RECIPE = quick(CASES["recipe"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", ["train", "inference", "solve"])
def test_the_matmuls_are_those_of_the_step(name, step):
    config = quick(CASES[name]).model
    run = matmuls(config, step, CPU)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == step_flops(config, step)


def test_the_own_width_contender_has_the_official_rounding():
    own = Contender("official, own width", official=True, own_width=True)
    assert own in contenders(CASES["recipe"], CPU, compiling="never")
    assert own not in contenders(CASES["official"], CPU, compiling="never")
    config = effective_config(CASES["recipe"], own)
    assert (config.channel_width, config.token_width) == (256, 256)
    config = effective_config(CASES["recipe"], Contender("official", official=True))
    assert (config.channel_width, config.token_width) == (96, 96)
    assert step_flops(effective_config(CASES["recipe"], own), "train") / step_flops(
        config, "train"
    ) == pytest.approx(256 / 96, rel=0.05)


def test_every_contender_gets_the_same_carry_and_batch():
    config = RECIPE.model
    entries = [prepare(Contender(n), config, "train", None, CPU) for n in ("a", "b")]
    batch = make_batch(config, CPU)
    a, b = (make_carry(e.head, config, batch) for e in entries)
    assert torch.equal(a.inner_carry.z_H, b.inner_carry.z_H)
    assert torch.equal(a.inner_carry.z_L, b.inner_carry.z_L)
    assert not torch.equal(a.inner_carry.z_H, a.inner_carry.z_L)
    assert a.halted.tolist() == [True, False]
    assert not torch.equal(a.current_data["inputs"], batch["inputs"])
    first, second = (outcome(e) for e in entries)
    assert set(first) >= {"loss", "logits", "gradient of model.inner.lm_head.weight"}
    assert compare(first, second, 0.0, "b") == 0.0


def test_compare_names_what_differs():
    want = {"loss": torch.ones(1), "logits": torch.ones(4)}
    assert compare({n: 1.01 * t for n, t in want.items()}, want, 0.02, "x") == pytest.approx(0.01)
    with pytest.raises(ParityError, match="x: logits differs from the reference by 1.0e-01"):
        compare(want | {"logits": 1.1 * torch.ones(4)}, want, 0.02, "x")
    with pytest.raises(ParityError, match="loss is missing"):
        compare({"logits": torch.ones(4)}, want, 0.02, "x")
    with pytest.raises(ParityError, match="differs"):
        compare(want | {"loss": torch.tensor([float("nan")])}, want, 0.02, "x")


def test_one_changed_weight_is_refused():
    entry = prepare(Contender("changed"), RECIPE.model, "train", None, CPU)
    check_parity(entry, "train", None, CPU)
    assert entry.errors == {"one_cycle": 0.0, "loss": 0.0}
    with torch.no_grad():
        entry.head.model.inner.lm_head.weight.mul_(2)
    with pytest.raises(ParityError, match="changed, train step: loss differs.*it was not timed"):
        check_parity(entry, "train", None, CPU)


def test_the_references_loss_is_found_once():
    losses = {}
    for name in ("a", "b"):
        check_parity(
            prepare(Contender(name, policy="light"), RECIPE.model, "train", None, CPU),
            *("train", None, CPU, losses),
        )
    assert len(losses) == 1


def test_official_names_do_not_leak(official_path):
    before = set(sys.modules), list(sys.path)
    with official_code(official_path) as official:
        assert official is not None
        assert "models.layers" in sys.modules
    assert {n for n in set(sys.modules) - before[0] if n.split(".")[0] == "models"} == set()
    assert sys.path == before[1]


def test_the_reference_stays_the_reference_where_auto_takes_kernels():
    config = replace(RECIPE.model, backend="auto")
    assert prepare(Contender("reference"), config, "train", None, CPU).config.backend == "reference"
    kernels = Contender("triton", backend="auto")
    assert prepare(kernels, config, "train", None, CPU).config.backend == "auto"


def test_fused_operations_are_a_contender_named_after_their_backends(monkeypatch):
    choices = [Choice("inject", "cpp", ""), Choice("swiglu", "reference", "")]
    monkeypatch.setattr(backends, "report", lambda *_: choices)
    assert fused(RECIPE.model, CPU) == "cpp"
    found = contenders(RECIPE, CPU, "never", ["save", "recompute"])
    assert found[:3] == [
        Contender("reference", policy="save"),
        Contender("cpp", backend="auto", policy="save"),
        Contender("cpp, recompute", backend="auto", policy="recompute"),
    ]
    assert found[-1] == Contender("matmuls only", products=True)


def test_solving_goes_the_way_of_users_where_something_is_fused(monkeypatch):
    used = []
    real = contending.supervision_steps

    def watched(*arguments):
        used.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(contending, "supervision_steps", watched)
    plain, ours = (
        prepare(c, RECIPE.model, "solve", None, CPU)
        for c in (Contender("reference"), Contender("cpp", backend="auto"))
    )
    assert plain.run()[1].shape == (2, 9, 11)
    assert used == []
    assert ours.run()[1].shape == (2, 9, 11)
    assert [steps for _, _, steps, _ in used] == [RECIPE.model.halt_max_steps]


def test_on_a_gpu_the_official_code_is_compiled_and_padded(monkeypatch):
    monkeypatch.setattr(backends, "report", lambda *_: [Choice("inject", "triton", "")])
    device = torch.device("cuda")

    def official(case, **changes):
        found = contenders(case.of("bfloat16", changes.pop("batch", 768)), device, **changes)
        return {c.name: (c.compiled, c.padded) for c in found if c.official}

    assert official(CASES["official"]) == {
        "official": (False, 0),
        "official compiled": (True, 0),
        "official compiled, padded": (True, 112),
    }
    graph = [c for c in contenders(CASES["official"], device) if c.captured]
    assert [(c.name, c.backend) for c in graph] == [("triton, graph", "auto")]
    assert not any(c.captured for c in contenders(CASES["official"], device, step="solve"))
    assert official(CASES["nano-trm"])["official compiled, padded"] == (True, 96)
    assert "official compiled, padded" not in official(CASES["attention"])
    assert official(CASES["official"], compiling="never") == {
        "official": (False, 0),
        "official, padded": (False, 112),
    }
    for batch, compiled in ((768, True), (64, False), (8, False), (1, True)):
        found = official(CASES["official"], step="solve", batch=batch)
        assert ("official compiled" in found) == compiled
    assert "official compiled" not in official(CASES["maze"], step="solve")
    assert "official compiled" in official(CASES["maze"], step="solve", compiling="always")


def test_our_plain_code_is_compiled_for_training_only_on_a_gpu():
    names = {
        step: [c.name for c in contenders(CASES["official"], torch.device("cuda"), step=step)]
        for step in ("train", "solve")
    }
    assert "reference compiled" in names["train"]
    assert "reference compiled" not in names["solve"]


def test_what_is_quantised_says_where_its_recursion_is_plain(monkeypatch):
    monkeypatch.setattr(backends, "report", lambda *_: [Choice("inject", "triton", "")])
    for engine, name in (("triton", "triton, fp8"), ("reference", "triton, fp8, plain recursion")):
        monkeypatch.setattr(
            backends,
            "recursion_engine",
            lambda device, dtype, c, e=engine: e if c.quantize == "fp8" else "triton",
        )
        found = contenders(RECIPE, CPU, "never", ["save"], ["fp8"])
        assert [c.name for c in found if c.quantize != "none"] == [name]


def test_solving_is_every_supervision_step(extension):
    """The last logits; both codes halt nowhere before."""
    config = replace(RECIPE.model, halt_max_steps=4)
    entries = [
        prepare(c, config, "solve", None, CPU)
        for c in (Contender("reference"), Contender("cpp", backend="auto"))
    ]
    counts = []
    for entry in entries:
        with FlopCounterMode(display=False) as counter:
            loss, logits = entry.run()
        assert loss is None
        assert logits.shape == (2, 9, 11)
        counts.append(counter.get_total_flops())
    # Reading q in float32 is no product of matrices, so that it is the same in every batch.
    q = 4 * 2 * 2 * config.hidden_size * config.q_logits
    assert counts == [step_flops(config, "solve") - q] * 2
    check_parity(entries[1], "solve", None, CPU)
    assert set(entries[1].errors) == {"one_cycle", "loss"}
    with torch.no_grad():
        entries[1].head.model.inner.lm_head.weight.mul_(2)
    with pytest.raises(ParityError, match="cpp, solve step: loss differs"):
        check_parity(entries[1], "solve", None, CPU)


def test_without_fused_operations_the_reference_has_the_other_policies(monkeypatch):
    monkeypatch.setattr(backends, "report", lambda *_: [Choice("inject", "reference", "")])
    found = contenders(RECIPE, CPU, "never", ["save", "light"])
    assert found[:2] == [
        Contender("reference", policy="save"),
        Contender("reference, light", policy="light"),
    ]
    assert found[2].official


def test_a_stand_in_for_pydantic_has_fields_and_defaults():
    class Base(Fields):
        batch_size: int
        eps: float = 1e-5

    class Derived(Base):
        name: str

    made = Derived(batch_size=3, name="x", unknown=1)
    assert (made.batch_size, made.eps, made.name) == (3, 1e-5, "x")
    assert Derived(batch_size=3, name="x", eps=0.5).eps == 0.5
    with pytest.raises(ValueError, match="Derived needs name"):
        Derived(batch_size=3)


def test_the_official_code_runs_without_pydantic(official_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pydantic" else real(name)
    )
    monkeypatch.delitem(sys.modules, "pydantic", raising=False)
    with official_code(official_path) as official:
        entry = prepare(Contender("official", official=True), RECIPE.model, "train", official, CPU)
        check_parity(entry, "train", official, CPU)
        assert entry.head.model.config.__class__.__mro__[1] is Fields
    assert "pydantic" not in sys.modules


def test_the_official_token_mlp_is_the_same_with_padded_rows(official_path):
    padded = Contender("padded", official=True, padded=16)
    with official_code(official_path) as official:
        entry = prepare(padded, RECIPE.model, "train", official, CPU)
        assert type(entry.head.model.inner.L_level.layers[0].mlp_t).__name__ == "PaddedSwiGLU"
        check_parity(entry, "train", official, CPU)
    assert 0 < entry.errors["one_cycle"] < 1e-5


def test_a_captured_train_step_is_compared_as_it_is_replayed(monkeypatch):
    monkeypatch.setattr(contending, "Capture", Recorded)
    config = replace(quick(CASES["official"]).model, forward_dtype="float32")
    plain = Contender("plain", policy="save")
    entries = [
        prepare(contender, config, "train", None, CPU)
        for contender in (plain, replace(plain, name="graph", captured=True))
    ]
    assert (entries[0].captured(), entries[1].captured()) == (None, False)
    first = outcome(entries[1])
    assert entries[1].captured()
    places = [p.grad.data_ptr() for p in entries[1].head.parameters()]
    for again in range(2):  # gradients are not added up
        found, wanted = (outcome(entry) for entry in reversed(entries))
        assert found.keys() == wanted.keys() == first.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (again, name)
    assert places == [p.grad.data_ptr() for p in entries[1].head.parameters()]


def test_a_capture_that_fails_is_no_contender():
    graph = Contender("graph", policy="save", captured=True)
    entry = prepare(graph, RECIPE.model, "train", None, CPU)  # a CPU has no graphs
    with pytest.raises(RuntimeError, match="no CUDA graph could be made of it"):
        outcome(entry)


def test_a_solve_is_compared_as_it_is_replayed(monkeypatch):
    """Two supervision steps each: the graph is there after the second solve."""
    states, runs = iter([False, False, True]), []
    monkeypatch.setattr(contending, "solves_captured", lambda *_: next(states))
    monkeypatch.setattr(
        contending, "answers", lambda *given: runs.append(given[2:]) or torch.ones(2, 9, 11)
    )
    config = replace(RECIPE.model, halt_max_steps=2)
    entry = prepare(Contender("ours", backend="auto"), config, "solve", None, CPU)
    outcome(entry, brief=True)
    assert runs == [(2, True), (2, True), (1, True)]
    entry.plain()
    assert runs[3:] == [(2, False)]


def test_solving_on_a_cpu_has_no_graph():
    entry = prepare(Contender("ours", backend="auto"), RECIPE.model, "solve", None, CPU)
    assert entry.captured() is None
