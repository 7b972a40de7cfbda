"""The official code of a checkout, imported beside ours.

Owns its module names while it is in use. Imported by the other modules of the benchmarks and by
`suite`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

_TOP_NAMES = ("models", "utils", "dataset", "evaluators")  # of the official checkout


class Official(NamedTuple):
    """What is used of the official code."""

    model: Callable[[dict[str, Any]], nn.Module]
    loss_head: Callable[[nn.Module, str], nn.Module]
    layers: Any


class Fields:
    """What the official configuration uses of pydantic's BaseModel, where that is not installed."""

    def __init__(self, **values: Any) -> None:
        for kind in type(self).__mro__:
            for name in getattr(kind, "__annotations__", {}):
                if name in values:
                    setattr(self, name, values[name])
                elif not hasattr(self, name):
                    raise ValueError(f"{type(self).__name__} needs {name}")


@contextlib.contextmanager
def official_code(checkout: Path | None) -> Iterator[Official | None]:
    """The official classes of a checkout, or None for None.

    Its top-level module names exist inside only (torch.compile looks modules up by name).

    Raises:
        ValueError: the folder is no checkout, or a package that the official code imports is not
            installed.
    """
    if checkout is None:
        yield None
        return
    file = "models/recursive_reasoning/trm.py"
    if not (checkout / file).is_file():
        raise ValueError(f"{checkout}: not a checkout of the official code, {file} is missing")
    ours = {n: m for n, m in sys.modules.items() if n.split(".")[0] in _TOP_NAMES}
    path = list(sys.path)
    for name in ours:
        del sys.modules[name]
    stand_in = importlib.util.find_spec("pydantic") is None
    if stand_in:
        sys.modules["pydantic"] = types.ModuleType("pydantic")
        vars(sys.modules["pydantic"])["BaseModel"] = Fields
    sys.path.insert(0, str(checkout.resolve()))
    try:
        trm = importlib.import_module("models.recursive_reasoning.trm")
        losses = importlib.import_module("models.losses")
        layers = importlib.import_module("models.layers")
        yield Official(trm.TinyRecursiveReasoningModel_ACTV1, losses.ACTLossHead, layers)
    except ModuleNotFoundError as error:
        raise ValueError(f"the official code needs the package {error.name!r}") from error
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in _TOP_NAMES]:
            del sys.modules[name]
        if stand_in:
            del sys.modules["pydantic"]
        sys.modules.update(ours)
        sys.path[:] = path
