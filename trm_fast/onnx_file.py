"""Graphs as ONNX files: written, unrolled, described, and run in onnxruntime.

Owns every use of onnx, onnxscript and onnxruntime, which the extra `trm-fast[onnx]` installs and
which are imported at the first call. The files have standard operations of opset 18 only. Imported
by `export.py`.

Dims legend: B items (dynamic), L puzzle tokens, M supervision steps.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from trm_fast.durable import one_line
from trm_fast.portable import NEW, ExportError

__all__ = ["LARGEST", "OPSET", "file_bytes", "from_program", "needed", "running", "unrolled"]

OPSET = 18
LARGEST = 1_900_000_000  # bytes of weights: a file of protocol buffers ends at 2 GiB
ZERO = 128  # what stands for 0 among unsigned numbers of eight bits
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def needed() -> None:
    """ExportError, with how to install it, where one of the packages is not there."""
    for name in PACKAGES:
        try:
            import_module(name)
        except ImportError:
            raise ExportError(
                f"ONNX files need {name}: pip install 'trm-fast[onnx]' (or --format pt2)"
            ) from None


def from_program(
    program: ExportedProgram, example: Mapping[str, Tensor], outputs: Sequence[str]
) -> Any:
    """The onnx.ModelProto of a `portable.traced` program.

    Args:
        program, example: of the same `Step` or `Solve`.
        outputs: names of what it returns, in this order; inputs are called as in `example`.

    Raises ExportError: an operation that ONNX has not, or a package that is not installed.
    """
    needed()
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                (dict(example),),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=list(outputs),
                custom_translation_table=_translations(),
                verbose=False,
            )
        assert made is not None
        model = made.model_proto
    except Exception as error:  # the exporter has errors of many kinds
        raise ExportError(f"ONNX cannot hold this network: {one_line(error)}") from error
    _bare(model)
    return model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What PyTorch's exporter does not know, or knows in a form that loses digits."""
    op, onnx = import_module("onnxscript").opset18, import_module("onnx")
    kinds = onnx.TensorProto
    zero = onnx.numpy_helper.from_array(np.array(ZERO, np.uint8))

    def unsigned(t: Any) -> Any:
        return op.Cast(op.Add(op.Cast(t, to=kinds.FLOAT), float(ZERO)), to=kinds.UINT8)

    def whole_products(a: Any, b: Any) -> Any:
        # Of two signed ones onnxruntime is slow; of a signed and an unsigned one its sums overflow
        # on CPUs with AVX2 and no VNNI.
        zeros = op.Constant(value=zero), op.Constant(value=zero)
        return op.MatMulInteger(unsigned(a), unsigned(b), *zeros)

    def expm1(x: Any) -> Any:  # exp(x) - 1 loses the digits of a small x
        return op.Mul(op.Tanh(op.Mul(x, 0.5)), op.Add(op.Exp(x), 1.0))

    aten = torch.ops.aten
    return {aten._int_mm.default: whole_products, aten.expm1.default: expm1}


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what the exporter tells its own developers."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _bare(model: Any) -> None:
    """Take away what the exporter notes about its source, and call the dynamic size `batch`."""
    graph = model.graph
    del graph.value_info[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    model.producer_name, model.producer_version = "trm_fast", ""


class _Builder:
    """Nodes and constants added to a graph, each under the name of the value it gives."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self._onnx = import_module("onnx")

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        made = self._onnx.helper.make_node(op, inputs, [output], name=output, **attributes)
        self.graph.node.append(made)
        return output

    def constant(self, name: str, values: Sequence[int]) -> str:
        array = np.asarray(values, np.int64)
        self.graph.initializer.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def filled(self, size: str, value: bool | float, output: str) -> str:
        """A tensor of that size, bool or float32."""
        kind = np.bool_ if isinstance(value, bool) else np.float32
        one = self._onnx.numpy_helper.from_array(np.array([value], kind))
        return self.node("ConstantOfShape", [size], output, value=one)

    def repeated(self, nodes: Sequence[Any], prefix: str, known: Mapping[str, str]) -> None:
        """A copy of `nodes`; what they make gets the prefix, what `known` names another name."""
        names = dict(known)
        for node in nodes:
            new = copy.deepcopy(node)
            names |= {output: prefix + output for output in node.output}
            new.name = prefix + node.name
            new.input[:] = [names.get(name, name) for name in node.input]
            new.output[:] = [names[name] for name in node.output]
            self.graph.node.append(new)


def unrolled(step: Any, shape: Mapping[str, tuple[int, int]], steps: int) -> Any:
    """The ModelProto of a `portable.Solve` of M steps, from that of its `portable.Step`.

    The nodes of the step stand in it M times, its weights once.

    Args:
        step: as `from_program` made it.  shape: see `portable.state_shape`.  steps: M.
    """
    helper = import_module("onnx").helper
    model = copy.deepcopy(step)
    graph, build = model.graph, _Builder(model.graph)
    nodes, length = list(graph.node), _length(graph)
    kept = [value for value in graph.input if value.name not in (*shape, "halted")]
    for part in (graph.node, graph.input, graph.output):
        del part[:]
    graph.input.extend(kept)
    axis, row = build.constant("axis", [1]), build.constant("row", [1, 1, length])
    size = build.node("Shape", ["inputs"], "size", start=0, end=1)
    known, later = {}, ""
    if shape:
        known["halted"] = build.filled(size, True, "start")
        later = build.filled(size, False, "go_on")
    for name, one in shape.items():
        own = build.constant(f"{name}_shape", one)
        full = build.node("Concat", [size, own], f"{name}_size", axis=0)
        known[name] = build.filled(full, 0.0, f"{name}_at_first")
    found: dict[str, list[str]] = {"preds": [], "q_halt_logits": []}
    for index in range(1, steps + 1):
        prefix = f"step_{index}/"
        build.repeated(nodes, prefix, known)
        known = {name: prefix + NEW + name for name in shape} | ({"halted": later} if shape else {})
        for name, parts in found.items():
            parts.append(build.node("Unsqueeze", [prefix + name, axis], f"{prefix}{name}_column"))
    for name, parts in found.items():
        build.node("Concat", parts, name, axis=1)
    best = build.node("ArgMax", ["q_halt_logits"], "best", axis=1, keepdims=1)
    best = build.node("Unsqueeze", [best, build.constant("last_axis", [2])], "best_column")
    index_of = build.node("Expand", [best, row], "best_row")
    chosen = build.node("GatherElements", ["preds", index_of], "chosen", axis=1)
    build.node("Squeeze", [chosen, axis], "answer")
    tensor = helper.make_tensor_value_info
    whole, real = helper.np_dtype_to_tensor_dtype(np.dtype("int32")), 1
    graph.output.extend(
        [
            tensor("answer", whole, ["batch", length]),
            tensor("preds", whole, ["batch", steps, length]),
            tensor("q_halt_logits", real, ["batch", steps]),
        ]
    )
    return model


def _length(graph: Any) -> int:
    """L."""
    inputs = next(value for value in graph.input if value.name == "inputs")
    return int(inputs.type.tensor_type.shape.dim[1].dim_value)


def file_bytes(model: Any, facts: Mapping[str, str]) -> bytes:
    """The file of a ModelProto; `facts` become its metadata, `custom_metadata_map` in onnxruntime.

    Raises ExportError for a graph that is not valid ONNX.
    """
    onnx = import_module("onnx")
    onnx.helper.set_model_props(model, dict(facts))
    try:
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)
    except Exception as error:  # the checker's, or a file beyond what can be
        raise ExportError(f"not a valid ONNX graph: {one_line(error)}") from error


def running(data: bytes) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """An ONNX file in onnxruntime on the CPU, one thread, as a function of the graph's dictionary.

    Raises ExportError where onnxruntime cannot run it.
    """
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds
        raise ExportError(f"onnxruntime cannot load it: {one_line(error)}") from error
    names = [value.name for value in session.get_outputs()]
    wanted = [value.name for value in session.get_inputs()]

    def run(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: batch[name].numpy() for name in wanted}
        try:
            found = session.run(names, given)
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run it: {one_line(error)}") from error
        return {name: torch.from_numpy(t) for name, t in zip(names, found, strict=True)}

    return run
