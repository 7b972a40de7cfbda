"""trm_fast: Tiny Recursive Models, trained and asked for answers.

Owns the public names, loaded at first use: `import trm_fast` itself imports neither torch nor
triton, reads no environment variable and prints nothing. Anything may import it.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trm_fast.checkpoint import load_checkpoint, save_checkpoint
    from trm_fast.config import ModelConfig, TrainConfig
    from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig, from_arrays
    from trm_fast.ema import EMA
    from trm_fast.losses import ACTLossHead
    from trm_fast.model import Model
    from trm_fast.optim import AdamATan2, SparseEmbeddingSignSGD
    from trm_fast.reasoning import Reasoning

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "ACTLossHead",
    "AdamATan2",
    "Model",
    "ModelConfig",
    "PuzzleDataset",
    "PuzzleDatasetConfig",
    "Reasoning",
    "SparseEmbeddingSignSGD",
    "TrainConfig",
    "__version__",
    "from_arrays",
    "load_checkpoint",
    "save_checkpoint",
]

_HOME = {
    "trm_fast.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "trm_fast.config": ("ModelConfig", "TrainConfig"),
    "trm_fast.data.dataset": ("PuzzleDataset", "PuzzleDatasetConfig", "from_arrays"),
    "trm_fast.ema": ("EMA",),
    "trm_fast.losses": ("ACTLossHead",),
    "trm_fast.model": ("Model",),
    "trm_fast.optim": ("AdamATan2", "SparseEmbeddingSignSGD"),
    "trm_fast.reasoning": ("Reasoning",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

# In a checkout that is not installed, kernels/ and csrc/ stand beside this folder; an installed
# package has them inside (setup.py).
_checkout = Path(__file__).resolve().parent.parent
if (
    not (_checkout / "trm_fast" / "kernels").exists()
    and (_checkout / "kernels" / "__init__.py").is_file()
    and (_checkout / "pyproject.toml").is_file()
):
    __path__.append(str(_checkout))
del _checkout


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'trm_fast' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
