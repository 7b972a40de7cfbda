"""When work is repeated call by call, when captured, and when a capture is given up."""

import logging

import pytest
import torch

from trm_fast.capture import WARMUP, Capture

CPU = torch.device("cpu")


def test_elsewhere_every_call_is_a_plain_one():
    calls = []
    capture = Capture(lambda: calls.append(1), CPU)
    assert not capture.captures
    for variant in (None, 1, 1, 2):
        capture(variant)
    assert len(calls) == 4


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Replays by calling what was captured."""

    def __init__(self):
        self.body, self.replays = None, 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch):
    """What `Capture` uses of CUDA, without a GPU; returns the log of what happened."""
    happened = []

    class Capturing:
        def __init__(self, made):
            happened.append("capture")

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    class Aside:
        def __init__(self, stream):
            happened.append("aside")

        __enter__, __exit__ = Capturing.__enter__, Capturing.__exit__

    made = []

    def graph():
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", Aside)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    return happened, made


def test_captured_after_warm_up_and_replayed(cuda):
    happened, made = cuda
    calls = []
    capture = Capture(lambda: calls.append(1), torch.device("cuda"))
    assert capture.captures
    for _ in range(WARMUP + 4):
        capture()
    assert happened == ["aside"] * WARMUP + ["capture"]
    assert len(calls) == WARMUP + 1, "the capture runs Python once more, and never again"
    assert [graph.replays for graph in made] == [4], "a capture does not do the work itself"


def test_another_variant_or_moved_tensors_are_captured_anew(cuda):
    happened, made = cuda
    capture = Capture(lambda: None, torch.device("cuda"))
    for _ in range(WARMUP + 1):
        capture(True)
    for _ in range(WARMUP + 2):
        capture(False)
    capture.reset()
    capture(False)
    assert happened == (["aside"] * WARMUP + ["capture"]) * 2 + ["aside"]
    assert [graph.replays for graph in made] == [1, 2]


def test_no_graph_where_none_is_wanted(cuda):
    happened, _ = cuda
    calls = []
    capture = Capture(lambda: calls.append(1), torch.device("cuda"), enabled=False)
    for _ in range(WARMUP + 2):
        capture()
    assert happened == [] and len(calls) == WARMUP + 2


def test_a_capture_that_fails_is_said_and_the_work_goes_on(cuda, caplog):
    happened, _ = cuda
    calls = []

    def body():
        calls.append(1)
        if happened[-1] == "capture" and len(calls) == WARMUP + 1:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    capture = Capture(body, torch.device("cuda"))
    with caplog.at_level(logging.WARNING):
        for _ in range(WARMUP + 3):
            capture()
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph of this step, it runs without: operation not permitted"
    ]
    assert not capture.captures and len(calls) == WARMUP + 4
