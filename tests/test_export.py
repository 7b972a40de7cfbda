"""The command export: its files against the model, what they say of themselves, every refusal."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from answering import save_run, tiny_model, with_given

from trm_fast import export, onnx_file
from trm_fast.agreement import Expected, some_boards
from trm_fast.inference import predict
from trm_fast.loading import load_model
from trm_fast.portable import ExportError, Step, examples, plain_model, state_shape

SUDOKU = {"seq_len": 81, "vocab_size": 11}
STEPS = 2
HAS_ONNX = all(importlib.util.find_spec(name) for name in onnx_file.PACKAGES)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs the extra onnx")


def exported(run, folder, *options):
    assert export.main([str(run), str(folder), "--steps", str(STEPS), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", changes=SUDOKU)


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """All files of the Sudoku model, which has attention; those that can be made here."""
    options = [] if HAS_ONNX else ["--format", "pt2"]
    return exported(run, tmp_path_factory.mktemp("files"), *options)


@pytest.fixture(scope="module")
def programs(files):
    """The .pt2 files: (function, what it is said to be, its operations) of step and solve."""
    found = {}
    for name in ("step", "solve"):
        extra = {"trm_fast.json": ""}
        program = torch.export.load(files / f"{name}.pt2", extra_files=extra)
        found[name] = program.module(), json.loads(extra["trm_fast.json"]), program.graph.nodes
    return found


def distance(found, expected):
    """Relative L2, of any number of items."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-9))


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def model_of(run):
    return load_model(run, device="cpu")[0]


def teacher_forced(model, inputs):
    """What a step takes and what the model gives, for two supervision steps."""
    step, given, pairs = Step(plain_model(model)), None, []
    with torch.no_grad():
        for _ in range(STEPS):
            given = given or examples(model, inputs)
            found = step(given)
            pairs.append((given, found))
            states = {name: found[f"new_{name}"] for name in state_shape(model)}
            given = {**given, **states, "halted": torch.zeros(len(inputs), dtype=torch.bool)}
    return pairs


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_program_gives_the_bits_of_the_model(run, programs, count):
    model = model_of(run)
    inputs = some_boards(model, 5)[:count]
    step, solve = programs["step"][0], programs["solve"][0]
    for given, expected in teacher_forced(model, inputs):
        found = step(given)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    solved = solve({"inputs": inputs})
    answers = predict(plain_model(model), inputs, depth=STEPS)
    assert torch.equal(with_given(model, inputs, solved["answer"]), answers.tokens)
    assert solved["preds"].shape == (count, STEPS, 81)
    if count:
        best = solved["q_halt_logits"].max(1)
        assert torch.equal(best.values, answers.q)
        assert torch.equal(best.indices + 1, answers.step)


@needs_onnx
@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_onnx_step_gives_the_numbers_of_the_model(run, files, count):
    model = model_of(run)
    step = onnx_file.running((files / "step.onnx").read_bytes())
    for given, expected in teacher_forced(model, some_boards(model, 5)[:count]):
        found = step(given)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert name == "preds" or distance(found[name], tensor) < 1e-4, name
        assert torch.equal(found["preds"], found["logits"].argmax(-1).int())


@needs_onnx
def test_an_onnx_solve_answers_as_the_model(run, files):
    model = model_of(run)
    inputs = some_boards(model, 9)
    answers = predict(model, inputs, depth=STEPS)
    solve = session(files / "solve.onnx")
    found = dict(
        zip(
            [value.name for value in solve.get_outputs()],
            solve.run(None, {"inputs": inputs.numpy()}),
            strict=True,
        )
    )
    answer = torch.from_numpy(found["answer"])
    assert torch.equal(with_given(model, inputs, answer), answers.tokens)
    np.testing.assert_allclose(found["q_halt_logits"].max(1), answers.q, atol=1e-3)
    last = predict(model, inputs, depth=STEPS, select="last").tokens
    preds = torch.from_numpy(found["preds"])
    assert torch.equal(with_given(model, inputs, preds[:, -1]), last)
    first = predict(model, inputs, depth=1).tokens
    assert (first != last).any(), "the steps of this model do not differ"
    assert torch.equal(with_given(model, inputs, preds[:, 0]), first)


@needs_onnx
def test_a_flagged_item_starts_anew_among_others_that_go_on(files, run):
    model = model_of(run)
    step = onnx_file.running((files / "step.onnx").read_bytes())
    (first, one), (second, two) = teacher_forced(model, some_boards(model, 4))
    mixed = {**second, "halted": torch.tensor([True, False, False, True])}
    found = step(mixed)["logits"]
    assert distance(found[[0, 3]], one["logits"][[0, 3]]) < 1e-4
    assert distance(found[[1, 2]], two["logits"][[1, 2]]) < 1e-4
    assert distance(one["logits"], two["logits"]) > 0.1


@needs_onnx
def test_the_graphs_have_standard_operations_only(files, programs):
    import onnx

    for name in ("step.onnx", "solve.onnx"):
        model = onnx.load(files / name)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        assert b"trm_fast/" not in model.SerializeToString(), "paths of this machine"
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    for _, _, nodes in programs.values():
        called = {str(node.target) for node in nodes if node.op == "call_function"}
        assert {name.partition(".")[0] for name in called} <= {
            "aten",
            "<built-in function getitem>",
        }
        assert not any(node.meta.get("stack_trace") for node in nodes)


@needs_onnx
def test_files_say_what_they_are(files, programs):
    held = {name: facts for name, (_, facts, _) in programs.items()}
    for name, facts in held.items():
        meta = session(files / f"{name}.onnx").get_modelmeta().custom_metadata_map
        assert meta == {**facts, "opset": "18"}
    assert held["step"] == {
        "trm_fast": export.__version__,
        "graph": "step",
        "network": "trm",
        "model": "tiny/step_7",
        "optimizer_step": "7",
        "weights": "ema",
        "products": "float32",
        "seq_len": "81",
        "vocab_size": "11",
        "tokens": "0 padding, 1 blank, digit d is d + 1; row by row",
        "supervision_steps": "2",
        "states": '{"z_H": [81, 16], "z_L": [81, 16]}',
    }
    assert held["solve"] == {**held["step"], "graph": "solve"}


@needs_onnx
def test_a_graph_that_says_something_else_is_not_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "traced", lambda *_: None)
    monkeypatch.setattr(onnx_file, "from_program", lambda *_: None)
    monkeypatch.setattr(onnx_file, "file_bytes", lambda *_: b"")

    def other(batch):
        with torch.no_grad():
            found = Step(plain_model(tiny_model(3, **SUDOKU)))(batch)
        return found

    monkeypatch.setattr(onnx_file, "running", lambda data: other)
    folder = tmp_path / "out"
    status = export.main([str(run), str(folder), "--format", "onnx", "--graph", "step"])
    out, err = capsys.readouterr()
    assert (status, out) == (6, "") and not folder.exists()
    assert err.startswith(f"trm-fast export: {run}: new_z_H of a step has a relative error of ")
    assert err.count("\n") == 1


def test_int8_files_are_of_int8_products_and_a_file_in_the_way_is_one_line(
    run, tmp_path, capsys, monkeypatch
):
    asked = []

    def traced(module, example):
        asked.append(module)

    def loaded(data):
        return lambda batch: torch.no_grad()(asked[-1])(batch)

    for name, made in (
        ("traced", traced),
        ("program_bytes", lambda *_: b"a file"),
        ("loaded_program", loaded),
    ):
        monkeypatch.setattr(export, name, made)
    options = ["--format", "pt2", "--graph", "step"]
    for given, name in (["--int8"], "step-int8.pt2"), ([], "step.pt2"):
        assert export.main([str(run), str(tmp_path / "out"), *options, *given]) == 0
        assert capsys.readouterr().out.startswith(
            f"{tmp_path / 'out' / name}  0.00 MB; on 8 boards"
        )
        assert asked[-1].inner.config.quantize == ("int8" if given else "none")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "step-int8.pt2",
        "step.pt2",
    ]
    (tmp_path / "file").write_text("")
    assert export.main([str(run), str(tmp_path / "file" / "out"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"trm-fast export: {tmp_path / 'file' / 'out' / 'step.pt2'}: cannot be")


@pytest.fixture(scope="module")
def expected():
    model = plain_model(tiny_model(1, **SUDOKU))
    return Expected(model, some_boards(model, 3), STEPS), Step(model)


@pytest.mark.parametrize("name", ["new_z_H", "new_z_L", "logits", "q_halt_logits"])
def test_a_small_error_in_any_output_is_seen(expected, name):
    expected, step = expected

    def slightly_wrong(batch):
        found = step(batch)
        return {**found, name: found[name] * 1.001}

    with pytest.raises(ExportError, match=f"^{name} of a step has a relative error of 1.0e-03"):
        expected.of_step(slightly_wrong)
    with torch.no_grad():
        agreement = expected.of_step(step)
    assert (agreement.unlike, agreement.cells) == (0, 3 * STEPS * 81)


def test_answers_of_other_steps_are_seen(expected):
    expected, step = expected
    found = expected._solved
    assert expected.of_solve(lambda given: rows(found, given)).unlike == 0
    swapped = {**found, "preds": found["preds"].flip(1)}
    with pytest.raises(ExportError, match="not that of the step with the highest q"):
        expected.of_solve(lambda given: rows(swapped, given))
    swapped = {**found, "preds": (found["preds"] + 1) % 11, "answer": (found["answer"] + 1) % 11}
    with pytest.raises(ExportError, match="cells have another answer"):
        expected.of_solve(lambda given: rows(swapped, given))


def rows(found, given):
    return {name: t[: len(given["inputs"])] for name, t in found.items()}


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package_it_says_how_to_install_it(run, tmp_path, capsys, monkeypatch, package):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        present = sys.modules if name == package else {}
        monkeypatch.setitem(sys.modules, name, None if present else object())
    status = export.main([str(run), str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and not (tmp_path / "out").exists()
    assert err == (
        f"trm-fast export: ONNX files need {package}: pip install 'trm-fast[onnx]' "
        "(or --format pt2)\n"
    )


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    gated = save_run(
        tmp_path / "gated", changes={"name": "gated_mlp", "halt_max_steps": 1, "num_heads": 1}
    )
    floats = save_run(tmp_path / "fp8", changes={"quantize": "fp8"})
    (tmp_path / "file").write_text("")
    for given, status, said in (
        ((tmp_path / "nowhere", "out"), 3, f"{tmp_path / 'nowhere'}: no such checkpoint"),
        ((gated, "out", "--int8"), 3, "gated_mlp needs quantize=none, got int8"),
        ((floats, "out"), 2, "8-bit floats are not exported: --int8, or --no-int8"),
        ((floats, tmp_path / "file"), 2, f"{tmp_path / 'file'}: is a file"),
        ((floats,), 2, "the following arguments are required: FOLDER"),
        ((floats, "out", "--format", "tflite"), 2, "argument --format: invalid choice: 'tflite'"),
    ):
        asked = [str(word) for word in given]
        asked += ["--format", "pt2"] if "--format" not in asked else []
        assert export.main(asked) == status
        out, err = capsys.readouterr()
        assert out == "" and said in err and err.count("\n") == 1
