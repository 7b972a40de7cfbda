"""Tiny sources, compilers that misbehave, and processes of their own, for tests of the extension.

Imported by tests/test_extension_*.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trm_fast.extension import build, library

ROOT = Path(__file__).resolve().parent.parent
BUILDING = re.compile(r"building the CPU extension for \w+, once: about \d+ s\n")

DISPATCH = """
#include "../common.h"
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED const char* trm_fast_instruction_set() {
#ifdef TRM_HAS_generic
  return "generic";
#else
  return "another";
#endif
}
EXPORTED int answer() { return ANSWER; }
"""
KERNEL = """
#include "../common.h"
namespace TRM_ISA {
int kernel() { return ANSWER; }
}
"""


class Tiny:
    """A source folder that compiles at once, a cache, and a compiler that counts its calls."""

    def __init__(self, folder: Path) -> None:
        self.source, self.cache, self.bin = folder / "csrc", folder / "cache", folder / "bin"
        self.calls_file = folder / "calls"
        (self.source / "cpu").mkdir(parents=True)
        self.bin.mkdir()
        self.write("common.h", "#pragma once\n#define ANSWER 42\n")
        self.write("cpu/dispatch.cpp", DISPATCH)
        self.write("cpu/kernel.cpp", KERNEL)
        self.compiler = self.program("cxx", f'echo "$*" >>{self.calls_file}\nexec c++ "$@"')

    def write(self, name: str, text: str) -> Path:
        path = self.source / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def program(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def compiled(self) -> list[str]:
        """Names of the files compiled since the last question."""
        if not self.calls_file.exists():
            return []
        lines = self.calls_file.read_text().splitlines()
        self.calls_file.unlink()
        words = [line.split() for line in lines if " -c " in line]
        return sorted(Path(w[w.index("-c") + 1]).name for w in words)

    def environment(self, **changes: str) -> dict[str, str]:
        own = {"TRM_FAST_CACHE": str(self.cache), "CXX": str(self.compiler), "TRM_FAST_EXT": "auto"}
        return {**os.environ, **own, **changes}

    def start(self, code: str, **changes: str) -> subprocess.Popen[str]:
        """Python running `code` on these sources, with `build` and `cache` imported."""
        prelude = (
            "from pathlib import Path; from trm_fast.extension import build, cache; "
            f"build.source_folder = lambda: Path({str(self.source)!r})\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", prelude + code],
            cwd=ROOT,
            env=self.environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, **changes: str) -> subprocess.CompletedProcess[str]:
        process = self.start(code, **changes)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """This process builds from tiny sources into a cache of its own, and has loaded nothing."""
    tiny = Tiny(tmp_path)
    monkeypatch.setattr(build, "source_folder", lambda: tiny.source)
    for name in ("_states", "_paths", "_errors"):
        monkeypatch.setattr(library, name, {})
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "_lib")
    for name, value in tiny.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "native_set", lambda: "generic")
    return tiny
