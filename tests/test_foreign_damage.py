"""Files of other projects with something missing or odd in them: one line for each."""

import pytest
import torch
from foreign_models import D, lucidrains_weights, s4nj1th_weights
from test_foreign import CYCLES, RS, nano_document

from trm_fast.durable import CheckpointError
from trm_fast.pretrained import read_saved


def without(weights, *names, **changes):
    return {k: v for k, v in weights.items() if k not in names} | changes


SCALAR = torch.tensor(1.0)
NO_GATE = without(s4nj1th_weights((1,)), "output_gate")
PAIRS = {"model_state_dict": s4nj1th_weights((2,))}
HALF = nano_document(sudoku=True)
HALF["callbacks"]["EMACallback"]["shadow"]["lm_head.weight"] = SCALAR
WHOLE = nano_document()
WHOLE["state_dict"]["lm_head.weight"] = torch.ones(7, D, dtype=torch.int32)
COMPLEX = nano_document()
COMPLEX["state_dict"]["lm_head.weight"] = torch.ones(7, D, dtype=torch.complex64)
DAMAGED = [
    (without(lucidrains_weights(), "to_pred.weight"), RS, "lacks to_pred.weight"),
    (without(lucidrains_weights(), "output_init_embed"), RS, "lacks output_init_embed"),
    (
        without(lucidrains_weights(), register_tokens=SCALAR),
        RS,
        r"register_tokens is \[\]; 2 sizes",
    ),
    ({"model_state_dict": NO_GATE}, CYCLES, "lacks output_gate"),
    (PAIRS, {**CYCLES, "semantics": "v1"}, "of neither version: one number each"),
    (HALF, {}, "is damaged, or not of nano-trm"),
    (WHOLE, {}, "inner.lm_head.weight is of int32; a floating type was expected"),
    (COMPLEX, {}, "inner.lm_head.weight is of complex64; a floating type was"),
    ({"a\x1b[2J": SCALAR}, {}, r"first names are a\?\[2J$"),
    ({"state_dict": {10**5000: SCALAR}}, {}, "too large numbers as keys"),
]


@pytest.mark.parametrize(("content", "given", "said"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_of_every_format(tmp_path, content, given, said):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=rf"m\.pt: .*{said}") as caught:
        read_saved(tmp_path / "m.pt", given=given)
    assert str(caught.value).isprintable()
