"""`make sanitize`: the extension's tests on a CPU library that checks its memory accesses.

AddressSanitizer and UndefinedBehaviorSanitizer are compiled into the library; Python starts with
their runtime preloaded, and any finding ends it. Leaks are not looked for: Python and PyTorch free
little at their end. What goes through PyTorch's compiler (`registered`, `compiles`) is left out: it
calls the same kernels with other arguments of the same kind, at ten times the time.

usage: python tests/sanitize.py [arguments for pytest]
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trm_fast.extension import build, cache  # noqa: E402

# Optimised little: what is looked for is in the source.
FLAGS = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    *("-O1", "-g1"),
)
TESTS = (
    "-m",
    "pytest",
    "-q",
    "--capture=sys",
    "-p",
    "no:cacheprovider",
    "-k",
    "extension and not registered and not compiles",
)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def command(name: str, arguments: list[str]) -> list[str]:
    """pytest on the library of set `name`; on tests/ops where no argument names tests."""
    named = any(Path(ROOT, argument.partition("::")[0]).exists() for argument in arguments)
    tests = arguments if named else [*arguments, "tests/ops"]
    library = ("--instruction-set", name, "--extension-flags", " ".join(FLAGS))
    return [sys.executable, *TESTS, *library, *tests]


def runtime() -> str:
    """AddressSanitizer's runtime, which must be loaded before all else; and the C++ library behind
    it, without which it cannot pass exceptions on."""

    def path(name: str) -> str:
        return build.run([*build.compiler(), f"-print-file-name={name}"]).strip()

    # GCC's, or clang's: with the machine in its name or, in newer layouts, without.
    names = ("libasan.so", f"libclang_rt.asan-{platform.machine()}.so", "libclang_rt.asan.so")
    is_clang = "clang" in build.run([*build.compiler(), "--version"]).lower()
    found = [path(name) for name in (names[1:] if is_clang else names[:1])]
    own = next((name for name in found if Path(name).is_absolute()), None)
    if own is None:
        raise SystemExit(f"{build.compiler()[0]} has no AddressSanitizer: no {names[is_clang]}")
    return f"{own} {path('libstdc++.so.6')}"


def main(arguments: list[str]) -> int:
    name = build.native_set()
    cache.provide("cpu", [name], FLAGS)  # before the runtime is preloaded: compilers do without
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": runtime()}
    return subprocess.run(command(name, arguments), cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
