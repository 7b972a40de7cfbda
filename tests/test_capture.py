"""When work is repeated call by call, when captured, and when a capture is given up."""

import gc
import logging
import weakref

import pytest
import torch

from trm_fast import capture as capturing
from trm_fast.capture import WARMUP, Capture, graphs_allowed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_elsewhere_every_call_is_a_plain_one():
    calls = []
    capture = Capture(lambda: calls.append(1), CPU)
    assert not capture.captures
    for variant in (None, 1, 1, 2):
        capture(variant)
    assert len(calls) == 4 and not capture.captured


class Stream:
    def __init__(self, name, happened):
        self.name, self.happened = name, happened

    def wait_stream(self, other):
        self.happened.append(f"{self.name} waits for {other.name}")


class Graph:
    """Counts replays."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


class Inside:
    """A context that notes that it was entered."""

    def __init__(self, happened=None, name=None, fails=None):
        self.happened, self.name, self.fails = happened, name, fails

    def __enter__(self):
        if self.name:
            self.happened.append(self.name)

    def __exit__(self, *error):
        if self.fails and error[0]:
            raise RuntimeError(self.fails)


@pytest.fixture
def cuda(monkeypatch):
    """What `Capture` uses of CUDA, without a GPU; returns what happened, and the graphs."""
    happened, made = [], []

    def graph():
        made.append(Graph())
        return made[-1]

    def capture(graph, pool, stream, capture_error_mode):
        assert (pool, stream.name, capture_error_mode) == ("pool", "own", "thread_local")
        assert not gc.isenabled()
        return Inside(happened, "capture", fails="the capture was invalidated")

    monkeypatch.setattr(capturing, "_shared", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("own", happened))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("now", happened))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Inside())
    monkeypatch.setattr(torch.cuda, "device", lambda device: Inside())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    return happened, made


ASIDE = ["own waits for now", "now waits for own"]


def test_captured_after_warm_up_and_replayed(cuda):
    happened, made = cuda
    calls = []
    capture = Capture(lambda: calls.append(1), CUDA)
    assert capture.captures
    for _ in range(WARMUP + 4):
        assert capture.captured == (len(calls) > WARMUP)
        capture()
    assert happened == ASIDE * WARMUP + ["capture"]
    assert len(calls) == WARMUP + 1, "the capture runs Python once more, and never again"
    assert [graph.replays for graph in made] == [4], "a capture does not do the work itself"
    assert gc.isenabled()


def test_another_variant_or_moved_tensors_are_captured_anew(cuda):
    happened, made = cuda
    capture = Capture(lambda: None, CUDA)
    for _ in range(WARMUP + 1):
        capture(True)
    for _ in range(WARMUP + 2):
        capture(False)
    capture.reset()
    capture(False)
    assert happened == (ASIDE * WARMUP + ["capture"]) * 2 + ASIDE
    assert [graph.replays for graph in made] == [1, 2]


def test_a_plain_call_beside_the_graph(cuda):
    happened, made = cuda
    calls = []
    capture = Capture(lambda: calls.append(1), CUDA)
    for _ in range(WARMUP + 1):
        capture()
    capture(plain=True)
    assert len(calls) == WARMUP + 2 and happened[-2:] == ASIDE
    capture()
    assert len(calls) == WARMUP + 2 and made[0].replays == 2


def test_another_word_than_0_and_1_is_refused(monkeypatch):
    monkeypatch.setenv("TRM_FAST_CUDA_GRAPH", "off")
    with pytest.raises(ValueError, match="TRM_FAST_CUDA_GRAPH is 0 or 1, not 'off'"):
        Capture(print, torch.device("cpu"))
    monkeypatch.setenv("TRM_FAST_CUDA_GRAPH", "")
    assert graphs_allowed()


@pytest.mark.parametrize("off", ["argument", "environment"])
def test_no_graph_where_none_is_wanted(cuda, off, monkeypatch):
    happened, _ = cuda
    if off == "environment":
        monkeypatch.setenv("TRM_FAST_CUDA_GRAPH", "0")
    calls = []
    capture = Capture(lambda: calls.append(1), CUDA, enabled=off != "argument")
    for _ in range(WARMUP + 2):
        capture()
    assert happened == [] and len(calls) == WARMUP + 2 and not capture.captures


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted\nwhen stream is capturing"), "operation not perm"),
        (NotImplementedError(), "NotImplementedError()"),
    ],
)
def test_a_capture_that_fails_is_said_once_and_the_work_goes_on(cuda, caplog, error, said):
    happened, _ = cuda
    calls = []

    def body():
        calls.append(1)
        if happened[-1] == "capture" and len(calls) == WARMUP + 1:
            raise error

    capture = Capture(body, CUDA)
    with caplog.at_level(logging.WARNING):
        for _ in range(WARMUP + 3):
            capture()
        other = Capture(body, CUDA)
        other()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"no CUDA graph, all goes on without: {said}")
    assert not capture.captures and not other.captures and len(calls) == WARMUP + 5
    assert gc.isenabled()


def test_devices_are_told_apart(cuda):
    one = Capture(lambda: None, torch.device("cuda", 1))
    assert one._device.index == 1 and Capture(lambda: None, CUDA)._device.index == 0
    assert len(capturing._shared) == 2


class Owner:
    def __init__(self, device):
        self.calls = 0
        self.capture = Capture(self.work, device)

    def work(self):
        self.calls += 1


def test_a_method_does_not_keep_its_object():
    owner = Owner(CPU)
    owner.capture()
    assert owner.calls == 1
    gone = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()
