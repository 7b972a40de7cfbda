"""`make sanitize`: the extension's tests on a CPU library that checks its memory accesses.

AddressSanitizer and UndefinedBehaviorSanitizer are compiled into the library; Python starts with
their runtime preloaded, and any finding ends it. Leaks are not looked for: Python and PyTorch free
little at their end. Compiled models (`is_registered`) are left out: they test PyTorch's compiler,
at ten times the time.

usage: python tests/sanitize.py [arguments for pytest]
"""

import os
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
    "extension and not registered",
)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def runtime() -> str:
    """AddressSanitizer's runtime, which must be loaded before all else; and the C++ library behind
    it, without which it cannot pass exceptions on."""
    compiler = build.compiler()
    is_clang = "clang" in build.run([*compiler, "--version"]).lower()
    names = ("libclang_rt.asan.so" if is_clang else "libasan.so", "libstdc++.so.6")
    return " ".join(build.run([*compiler, f"-print-file-name={n}"]).strip() for n in names)


def main(arguments: list[str]) -> int:
    name = build.native_set()
    cache.provide("cpu", [name], FLAGS)  # before the runtime is preloaded: compilers do without
    tests = arguments or ["tests/ops"]
    command = [sys.executable, *TESTS, "--instruction-set", name, "--extension-flags"]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": runtime()}
    return subprocess.run([*command, " ".join(FLAGS), *tests], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
