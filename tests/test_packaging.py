"""The distribution: metadata, what is packed where, and that the README's commands exist.

Runs against the checkout and, where trm-fast is installed (make test, CI), its installed metadata.
Building the archives and importing from them is the CI script's part.
"""

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import trm_fast
from trm_fast import __main__ as shell
from trm_fast.ops import OP_NAMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def requirement_names(requirements: list[str]) -> list[str]:
    return [re.split(r"[\[><=!~; ]", text, maxsplit=1)[0] for text in requirements]


def test_dependencies_are_few_and_torch_is_uncapped():
    requirements = PROJECT["dependencies"]
    assert requirement_names(requirements) == ["torch", "numpy", "safetensors", "einops", "triton"]
    assert requirements[0] == "torch>=2.11"
    assert requirements[-1] == "triton>=3.6; sys_platform == 'linux'"
    assert PROJECT["requires-python"] == ">=3.10"


def test_the_build_does_not_ask_for_torch():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert requirement_names(tomllib.loads(text)["build-system"]["requires"]) == ["setuptools"]


def test_constraints_satisfy_the_requirements():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    more = ["atheris==3.0.0", "onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0"]
    more += ["playwright==1.65.2"]
    assert pins == ["torch==2.13.0", "triton==3.6.0", "numpy<2.4", *more]


def test_optional_features_have_their_extras():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {
        "compat",
        "dev",
        "fuzz",
        "hub",
        "onnx",
        "tensorboard",
        "test",
        "trackio",
        "viz",
        "wandb",
    }


def test_console_script_is_the_shell():
    module, _, function = PROJECT["scripts"]["trm-fast"].partition(":")
    assert module == "trm_fast.__main__"
    assert callable(getattr(shell, function))


def test_installed_metadata_agrees():
    try:
        installed = importlib.metadata.metadata("trm-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("trm-fast is not installed here: run `make test`")
    assert installed["Version"] == trm_fast.__version__
    assert installed["License-Expression"] == "MIT"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="trm-fast")
    assert script.load() is shell.main


def packed(tmp_path: Path) -> set[str]:
    """The files that `setup.py build_py` puts into the package, as paths below trm_fast/."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
        + ["build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    top = tmp_path / "lib"
    assert [path.name for path in top.iterdir()] == ["trm_fast"]
    return {str(p.relative_to(top / "trm_fast")) for p in top.rglob("*") if p.is_file()}


def test_packages_are_mapped_into_trm_fast(tmp_path):
    pytest.importorskip("setuptools", reason="the build backend; pip brings its own")
    files = packed(tmp_path)
    sources = {str(p.relative_to(ROOT / "trm_fast")) for p in (ROOT / "trm_fast").rglob("*.py")}
    kernels = {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert {f for f in files if f.endswith(".py")} == sources | kernels
    sources = {f"csrc/{p.relative_to(ROOT / 'csrc')}" for p in (ROOT / "csrc").rglob("*.*")}
    assert {f for f in files if f.startswith("csrc/")} == sources
    assert "py.typed" in files
    shipped = {f"shipped/{p.name}" for p in (ROOT / "trm_fast" / "shipped").iterdir()}
    assert {f for f in files if f.startswith("shipped")} == shipped and len(shipped) == 4
    page = {f"demo/page/{p.name}" for p in (ROOT / "trm_fast/demo/page").iterdir()}
    assert {f for f in files if f.startswith("demo/page")} == page and "demo/page/app.js" in page
    (listed,) = tmp_path.glob("*.egg-info/SOURCES.txt")  # what an sdist has
    assert {f"trm_fast/{name}" for name in shipped | page} <= set(listed.read_text().splitlines())
    assert not any(f.startswith("_lib") for f in files), "compiled without being asked"


def test_kernels_resolve_inside_the_package_only():
    kernels = importlib.import_module("trm_fast.kernels")
    assert Path(kernels.__file__) == ROOT / "kernels" / "__init__.py"
    with pytest.raises(ImportError, match="import trm_fast.kernels"):
        importlib.import_module("kernels")


def test_make_covers_its_targets():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  make (\w+)", done.stdout, flags=re.M)
    assert listed == ["help", "train", "test", "check", "sanitize", "aot", "bench", "clean"]


@pytest.mark.parametrize(
    ("target", "extra", "runs"),
    [
        ("train", "viz", "python -m trm_fast.train seed=1"),
        ("test", "test", "python -m pytest seed=1"),
        ("check", "dev", "mypy"),
        ("sanitize", "test", "python tests/sanitize.py seed=1"),
        ("aot", "test", "python -m trm_fast.kernels.report --check seed=1"),
        ("bench", "test", "python -m pytest bench/ --benchmark-only seed=1"),
    ],
)
def test_make_installs_what_the_target_needs(tmp_path, target, extra, runs):
    given = [f"VENV={tmp_path}/env", "ARGS=seed=1", "TORCH_INDEX=https://example.org/cpu"]
    done = subprocess.run(
        ["make", "--dry-run", target, *given], cwd=ROOT, capture_output=True, text=True, check=True
    )
    install = f'install --quiet --editable ".[{extra}]" --constraint constraints.txt'
    assert f'{install} --extra-index-url "https://example.org/cpu"' in done.stdout
    assert f"{tmp_path}/env/bin/{runs}" in done.stdout


def test_make_aot_keeps_another_triton_in_an_environment_of_its_own(tmp_path):
    given = [f"VENV={tmp_path}/env", "TRITON=3.9.0"]
    done = subprocess.run(
        ["make", "--dry-run", "aot", *given], cwd=ROOT, capture_output=True, text=True, check=True
    )
    place = f"{tmp_path}/env-triton-3.9.0"
    installs = done.stdout.replace("\\\n", "").split("\n")
    (install,) = (
        line.split() for line in installs if line.startswith(f"{place}/bin/python -m pip")
    )
    assert install[-2:] == ["--no-deps", "triton==3.9.0"]
    assert f"{place}/bin/python -m trm_fast.kernels.report --check" in done.stdout


def readme_commands() -> list[list[str]]:
    """Words of each shell line of the README's fenced bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = (line.split(" #")[0].strip() for line in text.splitlines())
    return [shlex.split(line) for line in lines if line]


def test_readme_starts_with_the_two_commands():
    assert readme_commands()[:2] == [["make", "train"], ["make", "test"]]


def test_readme_commands_exist():
    targets = re.findall(
        r"^(\w+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M
    )
    checked = 0
    for words in readme_commands():
        if words[0] == "make":
            assert words[1] in targets, words
            checked += 1
        if words[0].endswith("trm-fast"):
            assert words[1] in {*shell.COMMANDS, *shell.ALIASES}, words
            checked += 1
        if "-m" in words:
            module = words[words.index("-m") + 1]
            if module.split(".")[0] == "trm_fast":
                assert importlib.util.find_spec(module) is not None, words
                checked += 1
    assert checked >= 8


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [t for t in local if not ((ROOT / page).parent / t).exists()] == []


def test_readme_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("torch.Size([4, 81]) ")
    assert "rope_attention cpp" in out or "rope_attention reference" in out


def test_readme_names_every_file_of_the_package():
    modules = [p.relative_to(ROOT / "trm_fast") for p in (ROOT / "trm_fast").rglob("*.py")]
    # One line stands for those of the ops, which are called alike everywhere.
    assert "`extension/<op>.py`" in README
    ops = {Path("extension", f"{op}.py") for op in OP_NAMES}
    missing = [str(name) for name in modules if f"`{name}`" not in README and name not in ops]
    assert not missing, "README.md, 'The files', lacks a line"


def test_only_the_console_writes_to_the_terminal():
    for path in (ROOT / "trm_fast").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        writes = [
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        ]
        outside = {"sys.stdout.write", "sys.stderr.write", "stdout.write"} & set(writes)
        assert not outside, f"{path.name}: {outside}; use trm_fast.console.say"
