"""trm_fast: Tiny Recursive Models, trained and asked for answers.

Owns the public names, loaded at first use: `import trm_fast` itself imports neither torch nor
triton, reads no environment variable and prints nothing. Anything may import it.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trm_fast.config import ModelConfig, TrainConfig
    from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig, from_arrays
    from trm_fast.losses import ACTLossHead
    from trm_fast.model import Model

__version__ = "0.1.0"

__all__ = [
    "ACTLossHead",
    "Model",
    "ModelConfig",
    "PuzzleDataset",
    "PuzzleDatasetConfig",
    "TrainConfig",
    "__version__",
    "from_arrays",
]

_HOME = {
    "ACTLossHead": "trm_fast.losses",
    "Model": "trm_fast.model",
    "ModelConfig": "trm_fast.config",
    "PuzzleDataset": "trm_fast.data.dataset",
    "PuzzleDatasetConfig": "trm_fast.data.dataset",
    "TrainConfig": "trm_fast.config",
    "from_arrays": "trm_fast.data.dataset",
}

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
    if name not in _HOME:
        raise AttributeError(f"module 'trm_fast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
