"""How a run goes, for people and for plots: a status line, metric files, optional trackers.

Owns `metrics.jsonl` and `metrics.csv` of a run folder, the status line, and the bridge to wandb,
trackio and tensorboard (imported only when asked for). May be imported by trainer and the command
modules; imports console and durable.

metrics.jsonl is the record: one object per line with "step" (int) and names such as
`train/lm_loss`; metrics.csv is the same as a table. A value that is not finite is null / empty.
"""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from trm_fast.console import say
from trm_fast.durable import replace_text, write_line

__all__ = [
    "Logger",
    "MetricsError",
    "MetricsWriter",
    "StatusLine",
    "format_seconds",
    "make_loggers",
    "read_metrics",
]

Value = int | float | str | bool | None
JSONL, CSV = "metrics.jsonl", "metrics.csv"
TRACKERS = ("wandb", "trackio", "tensorboard")


class MetricsError(ValueError):
    """Metric files that cannot be written; one line that names the file and the reason."""


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of RUN/metrics.jsonl in order; broken lines are left out, a missing file is empty.

    A process killed while writing leaves at most one broken line, the last.
    """
    try:
        data = (Path(run_dir) / JSONL).read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for line in data.split(b"\n"):
        try:
            row = {name: _plain(value) for name, value in json.loads(line).items()}
        except (ValueError, RecursionError, AttributeError):  # not JSON, or not such an object
            continue
        if type(row.get("step")) is int:
            rows.append(row)
    return rows


class MetricsWriter:
    """Appends rows to RUN/metrics.jsonl and RUN/metrics.csv.

    Args:
        run_dir: the run folder; made if missing.
        resume_step: None starts the files anew; otherwise rows of later steps (which the resumed
            run will make again) and broken lines are dropped and the rest is kept.

    Raises:
        MetricsError: files that cannot be written.
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self.run_dir = Path(run_dir)
        self._columns: list[str] = []
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            rows = [] if resume_step is None else read_metrics(self.run_dir)
            rows = [row for row in rows if row["step"] <= (resume_step or 0)]
            replace_text(self.run_dir / JSONL, "".join(map(_json_line, rows)))
            self._rewrite_csv(rows)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row; it is in the file when this returns.

        Args:
            step: the step that the values belong to.
            values: names to int, float, str, bool, None, or 0-d tensors and arrays.

        Raises:
            MetricsError: files that cannot be written.
        """
        row = {"step": int(step), **{name: _plain(value) for name, value in values.items()}}
        try:
            # Somebody may have deleted the folder of a run that goes on.
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with open(self.run_dir / JSONL, "a", encoding="utf-8", newline="") as file:
                file.write(_json_line(row))
            if row.keys() <= set(self._columns) and (self.run_dir / CSV).exists():
                with open(self.run_dir / CSV, "a", encoding="utf-8", newline="") as file:
                    file.write(_table([row], self._columns))
            else:  # a new column: rare, at the first row of each kind; or no file any more
                self._rewrite_csv(read_metrics(self.run_dir))
        except OSError as error:
            raise self._failed(error) from error

    def _rewrite_csv(self, rows: Sequence[Mapping[str, Value]]) -> None:
        self._columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        header = {name: name for name in self._columns}
        replace_text(self.run_dir / CSV, _table([header, *rows], self._columns))

    def _failed(self, error: OSError) -> MetricsError:
        return MetricsError(f"{self.run_dir}: metrics cannot be written: {error.strerror or error}")


def _plain(value: Any) -> Value:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a metric is a {type(value).__name__}; a number or a text is allowed")


def _json_line(row: Mapping[str, Value]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _table(rows: Iterable[Mapping[str, Value]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(["" if row.get(name) is None else row[name] for name in columns])
    # JSON can hold half a character, which no file of text can.
    return text.getvalue().encode("utf-8", "replace").decode("utf-8")


class StatusLine:
    """One live line on a terminal, a plain line now and then elsewhere.

    `step 1200/1800  loss 0.5320  exact 83.2%  2340 boards/s  eta 0:34`

    Args:
        total: steps of the run. start: steps already made (of a resumed run).
        stream: where to; None is standard output.
        live: redraw one line; None asks the stream whether it is a terminal.
        every: seconds between lines where not live. redraw: where live.
        clock: seconds that should not decrease; if they do, no time has passed.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        live: bool | None = None,
        every: float = 10.0,
        redraw: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        target = sys.stdout if stream is None else stream
        self._stream = stream
        self._live = bool(target is not None and target.isatty()) if live is None else live
        self._interval = redraw if self._live else every
        self._clock = clock
        self._total = total
        self._seen = (start, 0)  # step, boards at the last line
        self._boards = 0
        self._step = start
        self._last = clock()
        self._elapsed = 0.0
        self._since_line = math.inf
        self._rates: tuple[float, float] | None = None  # steps/s, boards/s, smoothed
        self._shown = ""

    def due(self, step: int) -> bool:
        """Whether `update` at this step would write: ask before reading metrics off a device."""
        passed = max(0.0, self._clock() - self._last)
        return step >= self._total or self._since_line + passed >= self._interval

    def update(
        self, step: int, loss: float | None = None, exact: float | None = None, boards: int = 0
    ) -> None:
        """Tell where the run is; writes when the interval has passed, and at the last step.

        Args:
            step: steps made. loss: the training loss.
            exact: share in [0, 1] of the boards halted since the last line that are right.
            boards: boards worked on since the last call.
        """
        now = self._clock()
        passed = max(0.0, now - self._last)
        self._last = now
        self._elapsed += passed
        self._since_line += passed
        self._step, self._boards = step, self._boards + boards
        if step < self._total and self._since_line < self._interval:
            return
        self._measure()
        self._since_line = 0.0
        self._draw(self.line(loss, exact))

    def line(self, loss: float | None, exact: float | None) -> str:
        """The text of the line as it is now."""
        width = len(str(self._total))
        parts = [f"step {self._step:{width}d}/{self._total}"]
        parts.append(f"loss {'-' if loss is None else f'{loss:.4f}'}")
        known = exact is not None and math.isfinite(exact)
        parts.append(f"exact {f'{100 * exact:.1f}%' if known and exact is not None else '-'}")
        left = max(0, self._total - self._step)
        if self._rates is None:
            return "  ".join([*parts, "eta -"])
        steps, boards = self._rates
        parts.append(f"{boards:.0f} boards/s" if boards < 1e6 else f"{boards:.1e} boards/s")
        parts.append(f"eta {format_seconds(left / steps) if steps > 0 else '-'}")
        return "  ".join(parts)

    def message(self, text: str) -> None:
        """Write a line of its own above the status line."""
        self._clear()
        self._say(text + "\n")
        if self._shown:
            self._say(self._shown)

    def close(self) -> None:
        """Leave the last status standing and go to the next line."""
        if self._shown:
            self._say("\n")
        self._shown = ""

    def _measure(self) -> None:
        """Fold the pace since the last line into the smoothed one."""
        if self._elapsed <= 0.0:
            return
        steps, boards = self._step - self._seen[0], self._boards - self._seen[1]
        new = (max(0, steps) / self._elapsed, max(0, boards) / self._elapsed)
        old = self._rates or new
        # Short intervals weigh less, so that a live line's pace does not flicker.
        weight = 1.0 if self._rates is None else 1.0 - math.exp(-self._elapsed / 5.0)
        self._rates = (
            old[0] + weight * (new[0] - old[0]),
            old[1] + weight * (new[1] - old[1]),
        )
        self._seen, self._elapsed = (self._step, self._boards), 0.0

    def _draw(self, text: str) -> None:
        if not self._live:
            self._say(text + "\n")
            return
        text = text[: max(10, shutil.get_terminal_size((100, 24)).columns - 1)]
        self._say("\r" + text.ljust(len(self._shown)))
        self._shown = text

    def _clear(self) -> None:
        if self._shown:
            self._say("\r" + " " * len(self._shown) + "\r")

    def _say(self, text: str) -> None:
        with suppress(OSError):  # a full disk under the log does not end the run
            if self._stream is None:
                say(text, end="")
                return
            self._stream.write(text)
            self._stream.flush()


def format_seconds(seconds: float) -> str:
    """`0:07`, `12:34`, `3:02:01`, `2d 03:02`; `-` for what is not a finite time >= 0."""
    if not 0.0 <= seconds < math.inf:
        return "-"
    total = int(seconds + 0.5)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days}d {hours % 24:02d}:{minutes % 60:02d}"
    if hours:
        return f"{hours}:{minutes % 60:02d}:{total % 60:02d}"
    return f"{minutes}:{total % 60:02d}"


class Logger(Protocol):
    """A tracker of experiments."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Report numbers of one step."""

    def close(self) -> None:
        """Finish the run."""


def make_loggers(
    names: Sequence[str],
    *,
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    run_dir: str | os.PathLike[str],
    resume_step: int | None = None,
) -> list[Logger]:
    """The trackers of these names, started.

    Args:
        names: of "wandb", "trackio", "tensorboard"; their own variables (WANDB_MODE) hold.
        project, run_name, config: how the run is called there, and what it was made with.
        run_dir: where local files go; wandb's run id is kept there, so that a resumed run goes on.
        resume_step: the step a resumed run goes on from, or None.

    Raises:
        ValueError: an unknown name, or a package that is not installed, with how to install it.
    """
    modules = {name: _tracker(name) for name in names}
    loggers: list[Logger] = []
    for name, module in modules.items():
        if name == "tensorboard":
            loggers.append(_TensorBoard(module, Path(run_dir) / name, resume_step))
        elif name == "trackio":
            resume = {} if resume_step is None else {"resume": "allow"}
            module.init(project=project, name=run_name, config=dict(config), **resume)
            loggers.append(_WandbLike(module))
        else:
            _start_wandb(module, project, run_name, config, Path(run_dir), resume_step)
            loggers.append(_WandbLike(module))
    return loggers


def _tracker(name: str) -> Any:
    if name not in TRACKERS:
        close = difflib.get_close_matches(name, TRACKERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"logger is {name!r}; allowed are {', '.join(TRACKERS)}{hint}")
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f'logger {name} is not installed: pip install "trm-fast[{name}]"'
        ) from None


def _start_wandb(
    module: Any,
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    run_dir: Path,
    resume_step: int | None,
) -> None:
    kept = run_dir / "wandb_id"
    resume = {}
    if resume_step is not None and kept.exists():
        resume = {"id": kept.read_text(encoding="utf-8").strip(), "resume": "allow"}
    run = module.init(
        project=project, name=run_name, config=dict(config), dir=str(run_dir), **resume
    )
    write_line(kept, run.id)


class _WandbLike:
    def __init__(self, module: Any) -> None:
        self._module = module

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._module.log({name: _plain(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._module.finish()


class _TensorBoard:
    def __init__(self, module: Any, folder: Path, resume_step: int | None) -> None:
        purge = None if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            number = _plain(value)
            if isinstance(number, (int, float)):
                self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()
