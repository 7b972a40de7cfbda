"""A model as graphs that need nothing of this package: one supervision step, and a whole solve.

Owns the model rebuilt in plain PyTorch (the reference operations, float32, weights of 8-bit
products made ready), the two modules that are traced, what goes into them, and their torch.export
programs. Imported by `onnx_file.py` and `export.py`.

Dims legend: B items (dynamic), S tokens incl. prefix, L puzzle tokens, D width, V vocabulary,
M supervision steps.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from trm_fast import quantize
from trm_fast.durable import one_line
from trm_fast.model import InnerModel, Model
from trm_fast.ops import AttentionWeights, BlockWeights, TokenMixWeights
from trm_fast.recursion import named, state_of

__all__ = [
    "ExportError",
    "Solve",
    "Step",
    "loaded_program",
    "plain_model",
    "program_bytes",
    "state_shape",
    "traced",
]

NEW = "new_"  # what the states that come out of a step are called, before their names
FACTS = "trm_fast.json"  # the file inside a .pt2 that says what it is


class ExportError(ValueError):
    """A graph that cannot be made, or that says something else than the model; one line."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class PreparedWeights(nn.Module):
    """Blocks of a network whose quantised products have their weights as int8 numbers and steps."""

    def __init__(self, blocks: Sequence[BlockWeights], dtype: torch.dtype) -> None:
        super().__init__()
        self._attends = isinstance(blocks[0].mixer, AttentionWeights)
        self._count = len(blocks)
        for index, block in enumerate(quantize.block(w, dtype) for w in blocks):
            self._keep(f"first_{index}", block.mixer[0])
            self._keep(f"second_{index}", block.mixer[1])
            self._keep(f"gate_up_{index}", block.gate_up)
            self._keep(f"down_{index}", block.down)

    def _keep(self, name: str, value: Tensor | quantize.Rows) -> None:
        if isinstance(value, Tensor):
            self.register_buffer(name, value.detach().clone())
            return
        self.register_buffer(f"{name}_numbers", value.numbers.detach().to(torch.int8))
        self.register_buffer(f"{name}_steps", value.steps.detach())

    def _rows(self, name: str) -> quantize.Rows:
        return quantize.Rows(getattr(self, f"{name}_numbers"), getattr(self, f"{name}_steps"))

    def weights(self) -> list[quantize.Block]:
        """As `layers.Network.weights`, with `quantize.Block` in place of master weights."""
        blocks = []
        for index in range(self._count):
            names = f"first_{index}", f"second_{index}"
            mixer: TokenMixWeights | tuple[quantize.Rows, quantize.Rows]
            if self._attends:
                mixer = self._rows(names[0]), self._rows(names[1])
            else:
                mixer = TokenMixWeights(getattr(self, names[0]), getattr(self, names[1]))
            ends = self._rows(f"gate_up_{index}"), self._rows(f"down_{index}")
            blocks.append(quantize.Block(mixer, *ends))
        return blocks


def plain_model(model: Model, products: str = "none", dtype: str = "float32") -> Model:
    """The same network on the reference operations, on the CPU, in evaluation mode.

    Args:
        model: any.  dtype: of the states.
        products: `arch.quantize` of the result, "none" or "int8".

    Raises:
        ValueError: a network that has no such products.
    """
    config = replace(
        model.config,
        backend="reference",
        policy="save",
        forward_dtype=dtype,
        quantize=products,
        dropout=0.0,
        batch_size=1,
        noise=0.0,  # these three are of training
        random_init=False,
        latents=1,
    )
    plain = Model(config)
    weights = {name: t.cpu() for name, t in model.state_dict().items()}
    weights.pop("inner.L_init_more", None)
    plain.load_state_dict(weights)
    return plain.eval().requires_grad_(False)


class Step(nn.Module):
    """One supervision step of a plain model, from a dictionary of tensors to another one.

    Takes `examples(model, B)`: the states by name, each [B, S, D] float32; inputs [B, L] int32;
    puzzle_identifiers [B] int32 where the model has puzzle rows; halted [B] bool, items to start
    anew, whose states may hold anything. A network without states takes inputs only.
    Returns the states under `new_` and their names; logits [B, L, V] float32; preds [B, L] int32,
    the answer; q_halt_logits [B] float32; q_continue_logits [B] float32 where there is one.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner = model.inner
        if model.config.quantize == "int8" and isinstance(self.inner, InnerModel):
            # Of another instance: the model goes on with its master weights.
            self.inner = plain_model(model, "int8", model.config.forward_dtype).inner
            assert isinstance(self.inner, InnerModel)
            for name in self.inner.variant.networks:
                weights = getattr(self.inner, name).weights()
                setattr(self.inner, name, PreparedWeights(weights, self.inner.forward_dtype))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        states = state_of({name: t for name, t in batch.items() if name.startswith("z_")})
        inputs = batch["inputs"]
        identifiers = batch.get("puzzle_identifiers", torch.zeros_like(inputs[:, 0]))
        # ONNX has 64-bit indices only.
        data = {"inputs": inputs, "puzzle_identifiers": identifiers.long()}
        new, logits, (q_halt, q_continue) = self.inner(states, data, batch.get("halted"))
        found = {NEW + name: state for name, state in named(new).items()}
        found |= {"logits": logits, "preds": logits.argmax(-1).int(), "q_halt_logits": q_halt}
        return found if q_continue is None else found | {"q_continue_logits": q_continue}


class Solve(nn.Module):
    """All supervision steps, none of them halting early.

    Takes inputs [B, L] int32, and puzzle_identifiers [B] int32 where the model has puzzle rows.
    Returns answer [B, L] int32, that of the step with the highest q, the earliest of several;
    preds [B, M, L] int32 and q_halt_logits [B, M] float32 of every step.
    """

    def __init__(self, step: Step, shape: Mapping[str, tuple[int, int]], steps: int) -> None:
        super().__init__()
        self.step = step
        self._shape = dict(shape)
        self._steps = steps

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = batch["inputs"]
        none = torch.zeros(1, 1, 1, dtype=self.step.inner.forward_dtype)
        states = {name: none.expand(len(inputs), *one) for name, one in self._shape.items()}
        halted = torch.ones_like(inputs[:, 0]).bool()
        preds, q = [], []
        for _ in range(self._steps):
            given = {**states, **batch, **({"halted": halted} if states else {})}
            found = self.step(given)
            states = {name: found[NEW + name] for name in states}
            halted = torch.zeros_like(halted)
            preds.append(found["preds"])
            q.append(found["q_halt_logits"])
        every, scores = torch.stack(preds, 1), torch.stack(q, 1)
        best = scores.argmax(1).view(-1, 1, 1).expand(-1, 1, every.shape[2])
        answer = every.gather(1, best).squeeze(1)
        return {"answer": answer, "preds": every, "q_halt_logits": scores}


def state_shape(model: Model) -> dict[str, tuple[int, int]]:
    """(S, D) of each state that a step takes and gives, by name."""
    return {
        name: (state.shape[1], state.shape[2])
        for name, state in named(model.inner.empty_carry(1)).items()
    }


def examples(model: Model, inputs: Tensor) -> dict[str, Tensor]:
    """What `Step` takes for inputs [B, L] int32 before the first supervision step."""
    size = len(inputs)
    shape = state_shape(model)
    given = {name: torch.zeros(size, *one) for name, one in shape.items()}
    given["inputs"] = inputs
    if model.config.puzzle_emb_ndim > 0:
        given["puzzle_identifiers"] = torch.zeros(size, dtype=torch.int32)
    if shape:
        given["halted"] = torch.ones(size, dtype=torch.bool)
    return given


def traced(module: nn.Module, example: dict[str, Tensor]) -> ExportedProgram:
    """The torch.export program of a `Step` or `Solve`, for any B.

    Raises ExportError where PyTorch cannot trace it.
    """
    batch = Dim("batch")
    shapes = {"batch": {name: {0: batch} for name in example}}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=True)
    except Exception as error:  # the compiler has errors of many kinds
        raise ExportError(f"torch.export cannot trace this network: {one_line(error)}") from error
    for node in program.graph.nodes:  # which say where this file lies on this machine
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    return program


def program_bytes(program: ExportedProgram, facts: str) -> bytes:
    """A .pt2 file, with `facts` (JSON) beside the program."""
    held = io.BytesIO()
    torch.export.save(program, held, extra_files={FACTS: facts})
    return held.getvalue()


def loaded_program(data: bytes) -> Any:
    """A .pt2 file as a function of the dictionary that the graph takes."""
    return torch.export.load(io.BytesIO(data)).module()
