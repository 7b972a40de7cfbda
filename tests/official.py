"""The official TinyRecursiveModels code, imported from a checkout for comparison.

Owns: importing modules of a checkout without leaving its very general top-level names (`models`,
`utils`, `dataset`, ...) or its folder in `sys.modules` / `sys.path`; stand-ins for the packages
that its `pretrain.py` wants and these tests do not need; the provenance of a checkout (commit,
hashes of the files used).
Imported by tests and by tests/golden/record.py. Needs einops and pydantic, as the official code.
Source: SamsungSAILMontreal/TinyRecursiveModels, the files named in OFFICIAL_FILES.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trm_fast.config import ARCHS

# The commit that the recorded tensors were made from, and the files that made them.
OFFICIAL_COMMIT = "e7b68717f0a6c4cbb4ce6fbef787b14f42083bd9"
OFFICIAL_FILES = (
    "models/common.py",
    "models/ema.py",
    "models/layers.py",
    "models/losses.py",
    "models/sparse_embedding.py",
    "models/recursive_reasoning/trm.py",
    "models/recursive_reasoning/trm_singlez.py",
    "models/recursive_reasoning/trm_hier6.py",
    "models/recursive_reasoning/hrm.py",
    "models/recursive_reasoning/transformers_baseline.py",
    "pretrain.py",
)
# The networks that have a file in models/recursive_reasoning/.
NETWORKS = tuple(k for k, path in ARCHS.items() if path.startswith("recursive_reasoning."))
_TOP_NAMES = ("models", "utils", "dataset", "evaluators", "puzzle_dataset", "pretrain")
_LOADED: dict[Path, dict[str, types.ModuleType]] = {}


def _is_official(name: str) -> bool:
    return name.split(".", 1)[0] in _TOP_NAMES


def _stand_in(name: str, **attributes: Any) -> types.ModuleType:
    """An empty module whose unknown attributes are do-nothing decorators and callables."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module


def _keep(*_args: Any, **_kwargs: Any) -> Callable[[Any], Any]:
    return lambda function: function


class _NoParser:
    """In the place of argdantic's ArgParser: `.command()` leaves the function as it is."""

    command = staticmethod(_keep)


def _stand_ins() -> dict[str, types.ModuleType]:
    return {
        "tqdm": _stand_in("tqdm", tqdm=lambda iterable=(), **_: iterable),
        "wandb": _stand_in("wandb"),
        "coolname": _stand_in("coolname", generate_slug=lambda *_: "run"),
        "hydra": _stand_in("hydra", main=_keep),
        "omegaconf": _stand_in("omegaconf", DictConfig=dict),
        "argdantic": _stand_in("argdantic", ArgParser=_NoParser),
        "adam_atan2": _stand_in("adam_atan2", AdamATan2=None),
        "numba": _stand_in("numba", njit=lambda function: function),
    }


@contextlib.contextmanager
def _importing(checkout: Path) -> Iterator[None]:
    """Inside, the checkout's modules import by their own names; afterwards no trace is left."""
    loaded = _LOADED.setdefault(checkout, {})
    stand_ins = _stand_ins()
    hidden = {n: m for n, m in sys.modules.items() if _is_official(n) or n in stand_ins}
    path = list(sys.path)
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    sys.modules.update(loaded)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        for name in [n for n in sys.modules if _is_official(n) or n in stand_ins]:
            module = sys.modules.pop(name)
            if _is_official(name):
                loaded[name] = module
        sys.modules.update(hidden)
        sys.path[:] = path


def official_module(checkout: str | Path, name: str) -> types.ModuleType:
    """A module of the checkout by its dotted name: "models.losses", "puzzle_dataset"."""
    root = Path(checkout).resolve()
    if not (root / "models" / "recursive_reasoning" / "trm.py").is_file():
        raise ValueError(f"{root}: no models/recursive_reasoning/trm.py in it")
    if name not in _LOADED.get(root, {}):
        with _importing(root):
            importlib.import_module(name)
    return _LOADED[root][name]


@dataclass(frozen=True)
class Official:
    """The official modules that the comparisons use."""

    path: Path
    trm: types.ModuleType
    layers: types.ModuleType
    losses: types.ModuleType
    sparse_embedding: types.ModuleType
    ema: types.ModuleType

    @property
    def Model(self) -> Any:
        return self.trm.TinyRecursiveReasoningModel_ACTV1

    def network(self, kind: str) -> types.ModuleType:
        """The module of the network whose file in recursive_reasoning/ is called so."""
        return official_module(self.path, f"models.recursive_reasoning.{kind}")

    def model(self, config: dict[str, Any]) -> Any:
        """A model of the class that the key "name" means; without it TRM's."""
        kind = config.get("name", "trm")
        return getattr(self.network(kind), ARCHS[kind].partition("@")[2])(config)

    @property
    def ACTLossHead(self) -> Any:
        return self.losses.ACTLossHead

    @property
    def SignSGD(self) -> Any:
        return self.sparse_embedding.CastedSparseEmbeddingSignSGD_Distributed

    @property
    def pretrain(self) -> types.ModuleType:
        return official_module(self.path, "pretrain")


def load_official(checkout: str | Path) -> Official:
    """The official classes of a checkout; raises ValueError where the folder is none."""
    root = Path(checkout).resolve()
    return Official(
        path=root,
        trm=official_module(root, "models.recursive_reasoning.trm"),
        layers=official_module(root, "models.layers"),
        losses=official_module(root, "models.losses"),
        sparse_embedding=official_module(root, "models.sparse_embedding"),
        ema=official_module(root, "models.ema"),
    )


def official_dict(**changes: Any) -> dict[str, Any]:
    """A tiny config dict with every key that the official trainer passes, `changes` applied."""
    config: dict[str, Any] = {
        "batch_size": 4,
        "seq_len": 10,
        "puzzle_emb_ndim": 32,
        "num_puzzle_identifiers": 6,
        "vocab_size": 9,
        "H_cycles": 3,
        "L_cycles": 2,
        "H_layers": 0,
        "L_layers": 1,
        "hidden_size": 32,
        "expansion": 4,
        "num_heads": 4,
        "pos_encodings": "rope",
        "halt_max_steps": 3,
        "halt_exploration_prob": 0.5,
        "forward_dtype": "float32",
        "mlp_t": False,
        "puzzle_emb_len": 2,
        "no_ACT_continue": True,
        "causal": False,
    }
    unknown = sorted(set(changes) - set(config) - {"name", "act_inference"})
    if unknown:
        raise ValueError(f"unknown config keys {unknown}; known: {sorted(config)}")
    return config | changes


def commit_of(checkout: str | Path) -> str | None:
    """The commit in the checkout's own .git, or None without one."""
    git = Path(checkout) / ".git"
    if not (git / "HEAD").is_file():
        return None
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    if (git / name).is_file():
        return (git / name).read_text().strip()
    packed = git / "packed-refs"
    found = re.search(
        rf"^([0-9a-f]{{40}}) {re.escape(name)}$",
        packed.read_text() if packed.is_file() else "",
        re.M,
    )
    return found[1] if found else None


def hashes_of(checkout: str | Path) -> dict[str, str]:
    """sha256 of every official file that the recordings rest on."""
    return {
        name: hashlib.sha256((Path(checkout) / name).read_bytes()).hexdigest()
        for name in OFFICIAL_FILES
    }
