"""The modules that are exported, before they are: every network, and products in 8 bits."""

import numpy as np
import pytest
import torch
from answering import boards, tiny_model, with_given

from trm_fast import onnx_file, quantize
from trm_fast.inference import predict, supervision_steps
from trm_fast.portable import NEW, Solve, Step, examples, plain_model, state_shape, traced

ROWS = {"puzzle_emb_ndim": 16, "puzzle_emb_len": 1, "num_puzzle_identifiers": 3}
MIXING = {"mlp_t": True, "pos_encodings": "none"}
CASES = [
    ({}, "none"),
    ({}, "int8"),
    ({**MIXING, **ROWS}, "none"),
    ({**MIXING, "q_logits": 1, "q_readout": "mean"}, "int8"),
    ({"pos_encodings": "learned", "forward_dtype": "bfloat16"}, "none"),
    ({"damping": 0.9, "noise": 0.1, "random_init": True}, "int8"),
    ({"latents": 3, **MIXING}, "none"),
    ({"name": "trm_singlez"}, "int8"),
    ({"name": "trm_hier6"}, "none"),
    ({"name": "hrm", "H_layers": 1, **MIXING}, "int8"),
    ({"name": "transformers_baseline", "H_layers": 1}, "none"),
    ({"name": "gated_mlp", "halt_max_steps": 1}, "none"),
]


@pytest.mark.parametrize(("changes", "products"), CASES)
def test_steps_and_a_solve_are_the_model(changes, products):
    model = plain_model(tiny_model(2, **changes), products)
    inputs = torch.from_numpy(boards(4).astype(np.int32))
    step, shape = Step(model), state_shape(model)
    given = examples(model, inputs)
    with_rows = model.config.puzzle_emb_ndim > 0
    assert ("puzzle_identifiers" in given) == with_rows
    if with_rows:
        given["puzzle_identifiers"] = torch.tensor([0, 1, 2, 1], dtype=torch.int32)
    batch = {"inputs": inputs, "puzzle_identifiers": torch.zeros(4, dtype=torch.int32)}
    batch |= {name: given[name] for name in batch if name in given}
    solve_given = {name: batch[name] for name in batch if name in given}
    preds = []
    with torch.no_grad():
        for expected in supervision_steps(model, batch, 3):
            found = step(given)
            assert torch.equal(found["logits"], expected.logits)
            assert torch.equal(found["q_halt_logits"], expected.q)
            assert found["preds"].dtype == torch.int32
            preds.append(found["preds"])
            given |= {name: found[NEW + name] for name in shape}
            given |= {"halted": torch.zeros(4, dtype=torch.bool)} if shape else {}
        found = Solve(step, shape, 3)(solve_given)
    assert torch.equal(found["preds"], torch.stack(preds, 1))
    best = predict(model, inputs, batch["puzzle_identifiers"], depth=3)
    assert torch.equal(with_given(model, batch["inputs"], found["answer"]), best.tokens)
    assert torch.equal(found["q_halt_logits"].amax(1), best.q)


def test_a_plain_model_leaves_the_other_as_it_is():
    model = tiny_model(2, forward_dtype="bfloat16", dropout=0.5)
    plain = plain_model(model, "int8")
    assert (model.config.quantize, model.config.forward_dtype) == ("none", "bfloat16")
    assert plain.config.forward_dtype == "float32"
    assert {row.implementation for row in plain.backend_report()} == {"reference"}
    Step(plain)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].float()), name


class Products(torch.nn.Module):
    """A product in eight bits, and what ONNX has no operation for."""

    def __init__(self):
        super().__init__()
        weight = quantize.rows(torch.randn(24, 40, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("numbers", weight.numbers.to(torch.int8))
        self.register_buffer("steps", weight.steps)

    def forward(self, batch):
        h = batch["h"]
        out = quantize.linear(h, quantize.Rows(self.numbers, self.steps))
        return {"out": out, "small": torch.expm1(1e-4 * h)}


def test_products_in_eight_bits_are_one_operation_with_the_same_bits():
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    module, h = Products(), torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(2))
    h[0, 0] = 0
    program = traced(module, {"h": h})
    graph = onnx_file.from_program(program, {"h": h}, ["out", "small"])
    (product,) = [node for node in graph.graph.node if node.op_type == "MatMulInteger"]
    kept = {value.name: value for value in graph.graph.initializer}
    assert kept[product.input[1]].data_type == 2, "the weight is not of eight bits"
    run = onnx_file.running(onnx_file.file_bytes(graph, {}))
    for count in (0, 1, 3):
        given = {"h": h[:count]}
        expected = module(given)
        for found in (run(given), program.module()(given)):
            assert torch.equal(found["out"], expected["out"])
            torch.testing.assert_close(found["small"], expected["small"], rtol=1e-5, atol=0)
