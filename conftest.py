"""Options of the command line, for tests/ and bench/.

`--official PATH`, a checkout of the official code; `--instruction-set NAME`, which CPU kernels to
test.
"""

from pathlib import Path

import pytest

OFFICIAL_FILES = ("pretrain.py", "puzzle_dataset.py", "models/recursive_reasoning/trm.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--official",
        metavar="PATH",
        default=None,
        help="checkout of SamsungSAILMontreal/TinyRecursiveModels: also run the live comparisons",
    )
    parser.addoption(
        "--instruction-set",
        metavar="NAME",
        default=None,
        help="run on the extension compiled for avx512_bf16, avx512, avx2 or generic",
    )
    parser.addoption(
        "--extension-flags",
        metavar="FLAGS",
        default="",
        help="more compiler flags for that, in one word",
    )


def check_official(path: Path) -> Path:
    """The checkout's absolute path, or a usage error naming the first file that it lacks."""
    for name in OFFICIAL_FILES:
        if not (path / name).is_file():
            raise pytest.UsageError(
                f"--official {path}: not a checkout of the official code, {name} is missing"
            )
    return path.resolve()


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--official")
    if given is not None:
        check_official(Path(given).expanduser())


@pytest.fixture(scope="session")
def official_path(request: pytest.FixtureRequest) -> Path:
    """Path of the official checkout given by `--official`; without it the test is skipped."""
    given = request.config.getoption("--official")
    if given is None:
        pytest.skip("compares with the official code live: run `pytest --official PATH`")
    return check_official(Path(given).expanduser())
