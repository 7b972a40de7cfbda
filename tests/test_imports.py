"""The import rule: a module of trm_fast imports only modules that stand before it in ORDER.

The order is the reading order of the code base; where it is kept there are no import cycles and a
reader never needs a later file to understand an earlier one. Imports inside functions count too.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trm_fast
from trm_fast.ops import OP_NAMES

ROOT = Path(__file__).resolve().parent.parent

# Each row may import the rows above it; members of one row do not import each other.
ORDER = [
    ["console", "options", "names", "answers"],
    ["model_config", "presets"],
    ["config", "symmetry", "philox"],
    ["overrides"],
    ["data.manifest", "data.atomic"],
    ["data.format"],
    ["data.augment", "data.building", "data.arc_source"],
    ["data.arc_augment", "data.arc_leaks"],
    ["data.sudoku_solver", "data.maze_solver"],
    ["data.sudoku_generator", "data.sudoku_source", "data.dataset"],
    ["data.maze_generator", "data.maze_source"],
    ["data.sudoku", "data.maze", "data.arc", "data.feed"],
    ["rules"],
    ["data", "puzzle_kind"],
    ["ops", "flat", "capture", "puzzle_rows"],
    ["distributed"],
    ["gradient_sum", "random_state"],
    ["extension.build"],
    ["extension.cache"],
    ["extension.library", "extension._common"],
    ["extension.rotate_qkv"],
    [f"extension.{op}" for op in (*OP_NAMES, "int8", "micro") if op != "deep_recursion"],
    ["extension.recursion_driver"],
    ["extension.deep_recursion"],
    ["extension"],
    ["quantize", "fp8"],
    ["reference"],
    ["memory", "flops", "timing"],
    ["backends", "fits"],
    ["layers", "recursion", "served", "latents", "noise"],
    ["variants"],
    ["gated_mlp"],
    ["unpickle"],
    ["torch_file"],
    ["durable"],
    ["hub"],
    ["model"],
    ["losses", "optimizers", "ema", "inference_step", "thresholds"],
    ["optim"],
    ["checkpoint", "viz", "progress"],
    ["reasoning", "labelled"],
    ["lanes", "schedule"],
    ["rollouts"],
    ["selectors"],
    ["inference", "arc_voting"],
    ["evaluators"],
    ["interop"],
    ["foreign_file"],
    ["foreign", "foreign_write"],
    ["pretrained"],
    ["loading", "puzzles", "runs", "portable", "reasoning_report"],
    ["reasoning_options"],
    ["evaluate_rollouts"],
    ["agreement", "onnx_file"],
    ["mazes", "splits", "profiling"],
    ["board_view"],
    ["board_image"],
    ["watching"],
    ["train_step", "training_data", "validation"],
    ["trainer"],
    ["summary"],
    ["runner"],
    ["floor", "workloads", "official"],
    ["contenders"],
    ["bench_report", "memory_bench", "micro_bench", "op_cases"],
    ["race"],
    ["bench"],
    ["op_bench"],
    ["suite.predictions", "suite.records"],
    ["suite.supervisor"],
    ["suite.session"],
    ["suite.ceilings", "suite.truth"],
    ["suite.steps"],
    ["suite.compiled", "suite.engine"],
    ["suite.speed"],
    ["suite.tuning"],
    ["suite.why"],
    ["suite.stages"],
    ["suite"],
    ["train", "evaluate", "solve", "convert", "export", "info"],
    ["demo.work"],
    ["demo.server"],
    ["demo.command"],
    ["demo"],
    ["__init__"],
    ["__main__"],
    ["demo.__main__"],
]
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}
# Names that any module may take from the package itself, whose __init__ loads the rest lazily.
FROM_PACKAGE = {"__version__"}
KERNELS_MAY_IMPORT = {
    *("__future__", "collections", "contextlib", "dataclasses", "functools", "os", "typing"),
    *("torch", "triton"),
}
# The compile report is a command and runs compilers: it may use more of the standard library.
REPORT_MAY_IMPORT = KERNELS_MAY_IMPORT | {
    *("argparse", "concurrent", "hashlib", "importlib", "io", "json"),
    *("multiprocessing", "pathlib", "re", "struct", "subprocess", "sys", "tempfile", "time"),
}
REPORT = {"_compile.py", "report.py"}
# What registers an op, and what an optimizer step is made of, is shared with the Triton kernels.
SHARED = ("kernels.registration", "kernels.coefficients")
# setup.py loads the first by its path, before anything is installed.
STANDARD_LIBRARY_ONLY = {"extension/build.py": set[str](), "extension/cache.py": {"trm_fast"}}


def module_name(path: Path) -> str:
    """`data/format.py` -> `data.format`, `data/__init__.py` -> `data`, `__init__.py` -> itself."""
    parts = list(path.relative_to(ROOT / "trm_fast").with_suffix("").parts)
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_name(p): p for p in sorted((ROOT / "trm_fast").rglob("*.py"))}


def absolute(node: ast.ImportFrom, package: str) -> str:
    """The dotted module that a `from ... import` statement names, with leading dots resolved."""
    if node.level == 0:
        return node.module or ""
    base = package.split(".")
    base = base[: len(base) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(source: str, package: str, known: set[str]) -> set[str]:
    """Modules of trm_fast that `source` imports, without the leading `trm_fast.`.

    Args:
        source: Python text.
        package: dotted package that relative imports start from, `trm_fast` or `trm_fast.data`.
        known: module names, to tell `from trm_fast import model` from a name of the package.
    """
    found = set()
    known = {*known, *SHARED}
    for node in ast.walk(ast.parse(source)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, package)
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix("trm_fast.")
                if base == "trm_fast" and alias.name in FROM_PACKAGE:
                    continue
                targets.append(f"trm_fast.{inner}" if inner in known else base)
        for target in targets:
            if target == "trm_fast":
                found.add("__init__")
            elif target.startswith("trm_fast."):
                found.add(target.removeprefix("trm_fast."))
    return found


def violations(name: str, source: str, package: str) -> list[str]:
    # A package's __init__ may import its own modules: it stands after them in ORDER.
    return sorted(
        other
        for other in imported(source, package, set(RANK))
        if not (other in SHARED and name.startswith(("extension.", "reference")))
        and (other not in RANK or RANK[other] >= RANK[name])
    )


def test_every_module_has_its_place():
    unplaced = set(modules()) - set(RANK)
    assert not unplaced, f"add to ORDER in {Path(__file__).name}: {sorted(unplaced)}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_only_earlier_modules(name):
    path = modules()[name]
    package = ".".join(["trm_fast", *path.parent.relative_to(ROOT / "trm_fast").parts])
    assert violations(name, path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from trm_fast.model import Model", "trm_fast"),
        ("import trm_fast.model", "trm_fast"),
        ("from trm_fast import model", "trm_fast"),
        ("from trm_fast import Model", "trm_fast"),
        ("from .model import Model", "trm_fast"),
        ("from . import model", "trm_fast"),
        ("from ..model import Model", "trm_fast.data"),
        ("def late():\n    from trm_fast.model import Model", "trm_fast"),
    ],
)
def test_the_rule_sees_a_violation(source, package):
    assert violations("ops", source, package) != []


def test_the_rule_lets_earlier_modules_pass():
    source = "from trm_fast import __version__, config\nfrom .data.format import Metadata\n"
    assert violations("model", source, "trm_fast") == []


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_triton_and_each_other(path):
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, "trm_fast.kernels")
            if not (base + ".").startswith("trm_fast.kernels."):
                roots.add(base.split(".")[0])
    assert roots <= (REPORT_MAY_IMPORT if path.name in REPORT else KERNELS_MAY_IMPORT)


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_the_builder_imports_the_standard_library_only(name):
    source = (ROOT / "trm_fast" / name).read_text(encoding="utf-8")
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add((node.module or "").split(".")[0])
    assert roots - sys.stdlib_module_names <= STANDARD_LIBRARY_ONLY[name]


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_trm_fast_loads_nothing_heavy():
    loaded = loaded_after("import trm_fast, trm_fast.__main__")
    assert "trm_fast" in loaded
    assert loaded.isdisjoint({"torch", "triton", "numpy", "matplotlib", "trm_fast.model"})


def test_importing_the_extension_builds_and_loads_nothing(tmp_path):
    code = (
        "import importlib, pkgutil, trm_fast.extension as e; "
        "[importlib.import_module(m.name) for m in "
        "pkgutil.walk_packages(e.__path__, 'trm_fast.extension.')]; "
        "print(e.library._states, e.library._paths)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TRM_FAST_CACHE": str(tmp_path), "CXX": "/nowhere/c++"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("{} {}\n", "")
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_loads_and_none_needs_triton_or_matplotlib():
    loaded = loaded_after("import trm_fast; [getattr(trm_fast, n) for n in trm_fast.__all__]")
    assert {"torch", "trm_fast.model"} <= loaded
    assert loaded.isdisjoint({"triton", "matplotlib"})


def test_a_model_runs_without_triton_and_matplotlib():
    config = (
        "dict(batch_size=2, seq_len=4, vocab_size=5, num_puzzle_identifiers=1, H_cycles=1, "
        "L_cycles=1, L_layers=1, hidden_size=8, num_heads=2, expansion=2, pos_encodings='rope', "
        "halt_max_steps=2, halt_exploration_prob=0.1, forward_dtype='float32')"
    )
    loaded = loaded_after(
        "import sys; sys.modules.update(triton=None, matplotlib=None); import torch, trm_fast; "
        f"model = trm_fast.Model({config}); batch = dict(inputs=torch.zeros(2, 4).int(), "
        "puzzle_identifiers=torch.zeros(2).int()); "
        "model(model.initial_carry(batch), batch)[1]['logits'].float().sum().backward()"
    )
    assert "trm_fast.model" in loaded


def test_the_public_names_are_those_type_checkers_see():
    tree = ast.parse((ROOT / "trm_fast" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n))
    declared = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == trm_fast._MODULE_OF
    assert {*declared, "__version__"} == set(trm_fast.__all__)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'trm_fast' has no attribute 'Modle'"):
        trm_fast.Modle  # noqa: B018
    assert set(trm_fast.__all__) <= set(dir(trm_fast))
