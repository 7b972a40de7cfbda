"""Metric files across interruptions, the status line under any clock, trackers that are absent."""

import csv
import io
import json
import math
import os
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from trm_fast.progress import (
    MetricsError,
    MetricsWriter,
    StatusLine,
    format_seconds,
    make_loggers,
    read_metrics,
)


def table(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# Metric files


def test_rows_are_in_both_files_at_once(tmp_path):
    run = tmp_path / "new" / "run"
    writer = MetricsWriter(run)
    assert read_metrics(run) == [] and table(run) == []
    writer.write(1, {"train/lm_loss": 0.5, "name": "a,b\nc", "n": torch.tensor(3)})
    writer.write(2, {"train/lm_loss": np.float32(0.25), "ok": True})
    writer.write(2, {"all/exact_accuracy": math.nan, "train/lm_loss": -math.inf, "none": None})
    assert read_metrics(run) == [
        {"step": 1, "train/lm_loss": 0.5, "name": "a,b\nc", "n": 3},
        {"step": 2, "train/lm_loss": 0.25, "ok": True},
        {"step": 2, "all/exact_accuracy": None, "train/lm_loss": None, "none": None},
    ]
    rows = table(run)
    assert list(rows[0]) == [
        "step",
        "train/lm_loss",
        "name",
        "n",
        "ok",
        "all/exact_accuracy",
        "none",
    ]
    assert [row["train/lm_loss"] for row in rows] == ["0.5", "0.25", ""]
    assert rows[0]["name"] == "a,b\nc" and rows[1]["ok"] == "True"
    assert sorted(path.name for path in run.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_a_new_run_starts_anew(tmp_path):
    MetricsWriter(tmp_path).write(1, {"a": 1})
    MetricsWriter(tmp_path)
    assert read_metrics(tmp_path) == [] and (tmp_path / "metrics.csv").read_text() == "step\n"


@pytest.mark.parametrize("tail", [b"", b'{"step": 5, "los', b"\xff\xfe\n", b'{"step": "6"}\n[1]\n'])
def test_a_resumed_run_has_each_step_once(tmp_path, tail):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        writer = MetricsWriter(run)
        for step in range(1, 5):
            writer.write(step, {"loss": 1 / step})
    for step in range(3, 7):
        if step > 4:
            MetricsWriter(whole, resume_step=step - 1).write(step, {"loss": 1 / step, "late": step})
    with open(cut / "metrics.jsonl", "ab") as file:
        file.write(tail)
    with open(cut / "metrics.csv", "ab") as file:
        file.write(tail)
    writer = MetricsWriter(cut, resume_step=2)
    assert [row["step"] for row in read_metrics(cut)] == [1, 2]
    assert [row["step"] for row in table(cut)] == ["1", "2"]
    for step in range(3, 7):
        writer.write(step, {"loss": 1 / step, **({"late": step} if step > 4 else {})})
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_resuming_without_files_begins_them(tmp_path):
    MetricsWriter(tmp_path, resume_step=10).write(11, {"a": 1})
    assert read_metrics(tmp_path) == [{"step": 11, "a": 1}]
    assert read_metrics(tmp_path / "nowhere") == []


def test_metrics_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MetricsError, match=r"file: metrics cannot be written: \w[^\n]*$"):
        MetricsWriter(tmp_path / "file")
    writer = MetricsWriter(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(MetricsError, match="cannot be written: Is a directory"):
        writer.write(1, {"a": 1})
    with pytest.raises(ValueError, match="a metric is a list"):
        writer.write(1, {"a": [1]})


def test_a_deleted_folder_is_made_again(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    writer.write(1, {"a": 1, "b": 2})
    shutil.rmtree(tmp_path / "run")
    writer.write(2, {"a": 3})
    writer.write(3, {"a": 4})
    assert read_metrics(tmp_path / "run") == [{"step": 2, "a": 3}, {"step": 3, "a": 4}]
    assert (tmp_path / "run" / "metrics.csv").read_text() == "step,a\n2,3\n3,4\n"


def test_files_that_cannot_be_replaced_stay_and_leave_nothing(tmp_path, monkeypatch):
    MetricsWriter(tmp_path).write(1, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MetricsError, match="metrics cannot be written: No space left on device$"):
        MetricsWriter(tmp_path, 0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# The status line


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def status(total, **settings):
    clock, stream = Clock(), io.StringIO()
    line = StatusLine(total, stream=stream, clock=clock, **settings)
    return line, clock, stream


def test_plain_lines_come_at_intervals_and_at_the_end():
    line, clock, stream = status(100, every=10.0)
    for step in range(1, 101):
        clock.now += 0.5
        expected = line.due(step)
        before = stream.tell()
        line.update(step, loss=1 / step, exact=step / 100, boards=64)
        assert (stream.tell() > before) == expected
    line.close()
    lines = stream.getvalue().split("\n")
    assert [text.split()[1].split("/")[0] for text in lines[:-1]] == [
        "1",
        "21",
        "41",
        "61",
        "81",
        "100",
    ]
    assert lines[2] == "step  41/100  loss 0.0244  exact 41.0%  128 boards/s  eta 0:30"
    assert lines[-2] == "step 100/100  loss 0.0100  exact 100.0%  128 boards/s  eta 0:00"
    assert lines[-1] == "" and "\r" not in stream.getvalue()


def test_a_live_line_is_drawn_over_and_messages_stand_above_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    line, clock, stream = status(10, live=True, redraw=0.1)
    line.update(1, loss=123456.789, boards=1)
    clock.now += 0.06
    line.update(2, boards=1)  # too soon
    clock.now += 0.06
    line.update(3, loss=1.0, exact=None, boards=1)
    first, second = stream.getvalue().split("\r")[1:]
    assert first == "step  1/10  loss 123456.7890  exact -  eta -"
    assert second.startswith("step  3/10  loss 1.0000  exact -  ") and len(second) <= 59
    assert len(second) >= len(first)  # nothing of the longer line is left
    line.message("saved")
    assert stream.getvalue().endswith("\rsaved\n" + second.rstrip())
    line.close()
    line.close()
    assert stream.getvalue().endswith(second.rstrip() + "\n")


def test_a_live_line_is_cut_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    line, _, stream = status(10, live=True)
    line.update(1, loss=1.0)
    assert stream.getvalue() == "\rstep  1/10  loss 1."


def test_a_stream_that_is_no_terminal_is_not_live():
    line, _, stream = status(10)
    line.update(1, loss=math.nan, exact=math.nan)
    assert stream.getvalue() == "step  1/10  loss nan  exact -  eta -\n"


def test_without_a_stream_the_line_goes_to_standard_output(capsys):
    line = StatusLine(10, clock=Clock())
    line.update(1, loss=1.0)
    line.message("hello")
    assert capsys.readouterr().out == "step  1/10  loss 1.0000  exact -  eta -\nhello\n"


def test_a_clock_that_goes_backwards_or_stands_still_does_no_harm():
    line, clock, stream = status(1000, every=1.0)
    for step in range(1, 1000):
        clock.now += [2.0, -3600.0, 0.0, 1.0][step % 4]
        line.update(step, loss=1.0, exact=0.5, boards=8)
    lines = stream.getvalue().splitlines()
    assert len(lines) > 300 and "eta -" in lines[0]
    for text in lines[2:]:
        eta = text.rsplit(" ", 1)[1]
        minutes, seconds = eta.split(":")
        assert int(minutes) >= 0 and 0 <= int(seconds) < 60
    # 4 steps in 3 counted seconds, 1 left
    assert lines[-1].endswith("boards/s  eta 0:01")


def test_the_time_left_counts_from_where_the_run_was_resumed():
    line, clock, stream = status(200, start=100, every=1.0)
    line.update(100)
    clock.now += 10.0
    line.update(150, boards=500)
    assert stream.getvalue().splitlines()[-1].endswith("50 boards/s  eta 0:10")


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3 * 3600 + 121, "3:02:01")]
    + [(2 * 86400 + 3 * 3600 + 125, "2d 03:02"), (-1, "-"), (math.nan, "-"), (math.inf, "-")],
)
def test_times(seconds, text):
    assert format_seconds(seconds) == text


# Trackers


def start(names, tmp_path, resume_step=None):
    return make_loggers(
        names,
        project="p",
        run_name="r",
        config={"lr": 1},
        run_dir=tmp_path,
        resume_step=resume_step,
    )


def fake(monkeypatch, name):
    """A module of that name that records its calls."""
    calls = []
    module = ModuleType(name)

    def record(what):
        def call(*args, **kwargs):
            calls.append((what, args, kwargs))
            return SimpleNamespace(id="id7")

        return call

    for what in ("init", "log", "finish"):
        setattr(module, what, record(what))

    class SummaryWriter:
        def __init__(self, *args, **kwargs):
            calls.append(("open", args, kwargs))

        add_scalar = staticmethod(record("add_scalar"))
        close = staticmethod(record("close"))

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_no_trackers_by_default(tmp_path):
    assert start([], tmp_path) == []


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_an_absent_tracker_says_how_to_install_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None
    )
    with pytest.raises(ValueError) as caught:
        start([name], tmp_path)
    assert str(caught.value) == f'logger {name} is not installed: pip install "trm-fast[{name}]"'


def test_an_unknown_tracker_is_named_with_a_suggestion(tmp_path):
    with pytest.raises(ValueError, match="logger is 'wanb'; allowed are .*; did you mean wandb?"):
        start(["wanb"], tmp_path)


def test_all_trackers_are_there_before_any_is_started(tmp_path, monkeypatch):
    calls = fake(monkeypatch, "wandb")
    with pytest.raises(ValueError, match="'nothing'"):
        start(["wandb", "nothing"], tmp_path)
    assert calls == []


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    calls = fake(monkeypatch, "wandb")
    (logger,) = start(["wandb"], tmp_path)
    logger.log(3, {"a": torch.tensor(2.0), "b": math.nan})
    logger.close()
    named = {"project": "p", "name": "r", "config": {"lr": 1}, "dir": str(tmp_path)}
    assert calls == [
        ("init", (), named),
        ("log", ({"a": 2.0, "b": None},), {"step": 3}),
        ("finish", (), {}),
    ]
    start(["wandb"], tmp_path, resume_step=3)
    assert calls[-1] == ("init", (), {**named, "id": "id7", "resume": "allow"})
    start(["wandb"], tmp_path)
    assert calls[-1] == ("init", (), named)


def test_trackio_and_tensorboard(tmp_path, monkeypatch):
    calls = fake(monkeypatch, "trackio")
    (logger,) = start(["trackio"], tmp_path, resume_step=2)
    logger.log(3, {"a": 1})
    named = {"project": "p", "name": "r", "config": {"lr": 1}, "resume": "allow"}
    assert calls == [("init", (), named), ("log", ({"a": 1},), {"step": 3})]
    calls = fake(monkeypatch, "torch.utils.tensorboard")
    (logger,) = start(["tensorboard"], tmp_path, resume_step=2)
    logger.log(3, {"a": 1, "text": "x", "nan": math.nan})
    logger.close()
    assert calls == [
        ("open", (str(tmp_path / "tensorboard"),), {"purge_step": 3}),
        ("add_scalar", ("a", 1, 3), {}),
        ("close", (), {}),
    ]


def test_metrics_are_json_by_the_letter(tmp_path):
    MetricsWriter(tmp_path).write(1, {"a": math.inf, "b": 1e-30, "c": 2**60})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": 1e-30, "c": 2**60}


def test_a_full_disk_under_the_log_does_not_end_the_run():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    line = StatusLine(2, stream=Full(), live=False)
    line.update(2, 0.5, 1.0, 8)
    line.message("evaluated")
    line.close()
