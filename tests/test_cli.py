"""The command shell: dispatch, help, did-you-mean, exit statuses, and `say` itself."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import trm_fast
from trm_fast import __main__ as shell
from trm_fast import console
from trm_fast.extension.build import BuildError

ROOT = Path(__file__).resolve().parent.parent


def run(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, **kwargs
    )


@pytest.fixture
def recorded(monkeypatch):
    """Commands answered by a stand-in that records module and arguments and returns 7."""
    calls = []

    def load(module):
        return types.SimpleNamespace(main=lambda argv: calls.append((module, argv)) or 7)

    monkeypatch.setattr(shell, "import_module", load)
    return calls


@pytest.mark.parametrize(
    ("argv", "module", "rest"),
    [
        (["train", "seed=1"], "trm_fast.train", ["seed=1"]),
        (["evaluate", "a", "b"], "trm_fast.evaluate", ["a", "b"]),
        (["eval", "--json"], "trm_fast.evaluate", ["--json"]),
        (["solve", "--help"], "trm_fast.solve", ["--help"]),
        (["info"], "trm_fast.info", []),
        (["bench"], "trm_fast.bench", []),
        (["data", "sudoku", "--seed", "1"], "trm_fast.data.sudoku", ["--seed", "1"]),
    ],
)
def test_dispatch(recorded, argv, module, rest):
    assert shell.main(argv) == 7
    assert recorded == [(module, rest)]


def test_argv_comes_from_the_process(recorded, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trm-fast", "info", "--json"])
    assert shell.main() == 7
    assert recorded == [("trm_fast.info", ["--json"])]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(capsys, argv):
    assert shell.main(argv) == 0
    out = capsys.readouterr().out
    for name, (_, meaning) in shell.COMMANDS.items():
        assert name in out
        assert meaning in out


def test_version(capsys):
    assert shell.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trm-fast {trm_fast.__version__}\n"


def test_data_help_lists_the_builders(capsys):
    assert shell.main(["data"]) == 0
    assert "sudoku" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "unknown command 'trian' (did you mean 'train'?); allowed: train, evaluate,"),
        (["evla"], "unknown command 'evla' (did you mean 'eval'?);"),
        (["zzz"], "unknown command 'zzz'; allowed: train,"),
        (["data", "sudoko"], "unknown builder 'sudoko' (did you mean 'sudoku'?);"),
    ],
)
def test_unknown_name_is_one_line_and_status_2(capsys, argv, said):
    assert shell.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"trm-fast: {said}")
    assert captured.err.count("\n") == 1


def test_module_run_answers_like_the_function():
    done = run("-m", "trm_fast", "trian")
    assert done.returncode == 2
    assert "did you mean 'train'?" in done.stderr


def test_say_writes_and_flushes(capsys, monkeypatch):
    console.say("to stdout")
    console.say("to stderr", err=True)
    console.say("no newline", end="")
    captured = capsys.readouterr()
    assert captured.out == "to stdout\nno newline"
    assert captured.err == "to stderr\n"


def test_say_survives_a_narrow_encoding(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.say("9×9 done")
    assert raw.getvalue() == b"9?9 done\n"


def test_say_without_a_console(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    console.say("nobody listens")


def test_say_outlives_its_reader():
    code = (
        "import sys; from trm_fast.console import say\n"
        "sys.stdin.readline()\n"  # until the reader has closed its end
        "for i in range(5000): say('x' * 100)\n"
        "say('still here', err=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert err == b"still here\n"


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BuildError("no C++ compiler"), 2, "trm-fast: no C++ compiler\n"),
    ],
    ids=["interrupt", "no extension"],
)
def test_what_ends_a_command_early_is_one_line(raised, status, text, monkeypatch, capsys):
    def main(argv):
        raise raised

    monkeypatch.setattr(shell, "import_module", lambda module: types.SimpleNamespace(main=main))
    assert shell.main(["info"]) == status
    assert capsys.readouterr() == ("", text)


@pytest.mark.parametrize(
    "name",
    ["trm_fast.console", "trm_fast.extension.build", "trm_fast.info", "torch", "trm_fast.demo"],
)
def test_an_interrupt_while_modules_are_loaded_is_one_line(name):
    """Of the package nothing but itself is loaded where no interrupt is caught yet."""
    code = (
        "import sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {name!r}:\n"
        "            sys.meta_path.remove(self)\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from trm_fast.__main__ import main\n"
        f"sys.exit(main([{'demo' if name == 'trm_fast.demo' else 'info'!r}]))\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_info_as_text():
    done = run("-m", "trm_fast", "info")
    assert done.returncode == 0, done.stderr
    for part in (f"trm_fast {trm_fast.__version__}", "torch", "cpu", "rope_attention", "reference"):
        assert part in done.stdout


def test_info_tells_what_became_of_the_compiled_library():
    done = run("-m", "trm_fast", "info", env={**os.environ, "TRM_FAST_EXT": "off"})
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "cpp 11 ops; not compiled: TRM_FAST_EXT=off" in lines
    assert "deep_recursion reference" in lines
    assert sum("(TRM_FAST_EXT=off)" in line for line in lines) <= 2, "once, not for every op"


def test_info_as_json():
    done = run("-m", "trm_fast", "info", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["versions"]["trm_fast"] == trm_fast.__version__
    assert told["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["devices"][0]["name"] == "cpu"
    assert told["threads"]["torch"] >= 1
    for table in told["backends"].values():
        assert {row["op"] for row in table} >= {"rope_attention", "token_mix", "stablemax_loss"}
        assert all(row["implementation"] and row["reason"] for row in table)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["info", "--jsno"], "unrecognized arguments: --jsno"),
        (["info", "--mem"], "unrecognized arguments: --mem"),
        (["bench", "--part", "x"], "argument --part: invalid choice: 'x' (choose from 'steps',"),
        (["data", "sudoku"], "the following arguments are required: --output-dir"),
        (["data", "maze", "--size", "x"], "argument --size: 'x' is not a whole number"),
        (["data", "arc", "--num-aug", "1e3"], "argument --num-aug: '1e3' is not a whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_options_is_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        shell.main(argv)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    command = " ".join(argv[:2] if argv[0] == "data" else argv[:1])
    assert err.startswith(f"trm-fast {command}: {said}") and err.endswith("; see --help\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("builder", shell.BUILDERS)
def test_help_of_builders_names_the_command(builder, capsys):
    with pytest.raises(SystemExit) as stopped:
        shell.main(["data", builder, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: trm-fast data {builder} ")


def test_commands_that_are_shown_start_this_python(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/python")
    for executable, shown in (
        ("/usr/bin/python", "python"),
        (str(tmp_path / ".venv" / "bin" / "python"), ".venv/bin/python"),
        ("/opt/a b/python", "'/opt/a b/python'"),
    ):
        monkeypatch.setattr("sys.executable", executable)
        assert console.program() == shown


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@needs_full
def test_a_log_on_a_full_disk_is_dropped_and_everything_else_is_an_error():
    """Dropped text must not come back as a failing flush when the process ends."""
    code = (
        "import sys; from trm_fast.console import as_log, say\n"
        "if sys.argv[1] == 'log':\n"
        "    with as_log(): [say('x' * 100) for _ in range(500)]\n"
        "else: say('an answer')\n"
    )
    for what, status in (("log", 0), ("answer", 1)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code, what], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
            )
        assert (done.returncode == 0) == (status == 0), done.stderr
        assert (b"No space left" in done.stderr) == (status == 1)


@needs_full
def test_there_is_a_log_again_when_there_is_room_again(tmp_path, monkeypatch):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with console.as_log():
            console.say("lost")
            with open(tmp_path / "log", "w") as room:
                os.dup2(room.fileno(), stream.fileno())
            console.say("kept")
    assert (tmp_path / "log").read_text() == "kept\n"
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console.say("no log")
