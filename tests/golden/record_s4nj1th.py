"""Records what s4nj1th/tiny-recursive-model computes: `python tests/golden/record_s4nj1th.py PATH`.

Owns: s4nj1th.safetensors and s4nj1th.json beside it: seeded initial weights as hashes, and on
portable weights the answers, losses and gradients of both versions of the model, that of `main.py`
("v1") and that of the notebook ("head"). Imported by nobody.
Source: a checkout of that project; its notebook's cells with classes are run, its training is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from golden.s4nj1th import SETTINGS, fill, puzzles, state_digests  # noqa: E402


def of_main(checkout: Path) -> tuple[Any, Any]:
    """Configuration and model class of `main.py`."""
    spec = importlib.util.spec_from_file_location("s4nj1th_main", checkout / "main.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.TRMConfig, module.TinyRecursiveModel


def of_notebook(checkout: Path) -> tuple[Any, Any, Any]:
    """Configuration, model and trainer class of the notebook."""
    cells = json.loads((checkout / "tiny-recursive-model.ipynb").read_text())["cells"]
    names = {"torch": torch, "nn": nn, "F": F, "dataclass": dataclasses.dataclass}
    module = ModuleType("s4nj1th_notebook")
    sys.modules[module.__name__] = module
    vars(module).update(names | {"Optional": Optional})
    for cell in cells:
        text = "".join(cell["source"])
        if any(f"class {name}" in text for name in ("TRMConfig", "ResidualBlock", "TRMTrainer")):
            exec(text, vars(module))
    return module.TRMConfig, module.TinyRecursiveModel, module.TRMTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of s4nj1th/tiny-recursive-model")
    checkout = parser.parse_args().checkout
    notebook = of_notebook(checkout)
    classes = {"v1": of_main(checkout), "head": notebook[:2]}
    tensors: dict[str, torch.Tensor] = {}
    text: dict[str, Any] = {}
    clues, digits = puzzles()
    onehot = F.one_hot(clues, 10).float().flatten(1)
    for semantics, (config_class, model_class) in classes.items():
        torch.manual_seed(0)
        model = model_class(config_class(**SETTINGS))
        text[semantics] = {
            "initial": state_digests(model.state_dict()),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        fill(model)
        logits = model(onehot).view(-1, 81, 9)
        loss = F.cross_entropy(logits.flatten(0, 1), digits.flatten() - 1)
        broken = notebook[2].constraint_loss(SimpleNamespace(), logits.flatten(0, 1))
        (loss + 0.1 * broken).backward()
        tensors[f"{semantics}/logits"] = logits.detach()
        tensors[f"{semantics}/losses"] = torch.stack([loss, broken]).detach()
        for name, p in model.named_parameters():
            assert p.grad is not None
            tensors[f"{semantics}/grad/{name}"] = p.grad
    (HERE / "s4nj1th.safetensors").write_bytes(save({k: tensors[k] for k in sorted(tensors)}))
    (HERE / "s4nj1th.json").write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
