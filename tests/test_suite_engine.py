"""The suite's gate before anything captured is timed: it fails where it must."""

import pytest
import torch
from capturing import InPlace
from test_suite_steps import tiny_session

from trm_fast.contenders import ParityError
from trm_fast.suite import engine


class Wrong(InPlace):
    """Where a graph is wanted, one weight's average is off by its last bit."""

    def __init__(self, body, device, enabled=True):
        super().__init__(body, device, enabled)
        self.enabled = enabled

    def __call__(self, variant=None, plain=False):
        super().__call__(variant, plain)
        if self.enabled:
            average = self.body.__self__.ema.shadow["inner.q_head.bias"]
            average[0] = torch.nextafter(average[0], average[0] + 1)


def test_a_captured_step_that_differs_in_one_bit_is_wrong(tmp_path, monkeypatch):
    session = tiny_session(tmp_path, None)
    (row,) = engine.exact(session, "mlp_t")
    assert (row["name"], row["value"]) == ("engine/mlp_t/exact", 1.0)
    monkeypatch.setattr("trm_fast.train_step.Capture", Wrong)
    with pytest.raises(ParityError, match="mlp_t step: average of inner.q_head.bias differs"):
        list(engine.exact(session, "mlp_t"))


def test_a_plain_step_is_not_taken_for_a_graph(tmp_path):
    session = tiny_session(tmp_path, None)
    engine.must_be_captured(session, "the step", captured=False)
    session.device = torch.device("cuda")
    engine.must_be_captured(session, "the step", captured=True)
    with pytest.raises(ParityError, match="the step was not captured: the log says why"):
        engine.must_be_captured(session, "the step", captured=False)
