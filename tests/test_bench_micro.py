"""The microkernels' bench: right products, honest bookkeeping, and that it runs at all.

No test looks at how long anything took.
"""

import pytest
import torch

from trm_fast import micro_bench
from trm_fast.extension import library, micro
from trm_fast.micro_bench import CASES, FLOOR, QUICK, MicroCase


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 16, 16), (13, 48, 80), (97, 96, 48), (230, 16, 64)])
def test_the_product_that_is_timed_is_right(m, k, n, dtype, extension):
    a, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    out, rates = micro.product(a, w, 2, 3)
    exact = a.double() @ w.double().t()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((out - exact).abs().max() / exact.abs().max()) < limit
    assert rates.shape == (3,)
    assert (rates > 0).all()


@pytest.mark.parametrize(("m", "k", "n"), [(1, 16, 16), (13, 48, 80), (97, 96, 48), (230, 16, 64)])
def test_the_product_of_whole_numbers_is_exact(m, k, n, extension):
    a, w = (torch.randint(-127, 128, s, dtype=torch.int8) for s in ((m, k), (n, k)))
    a[0], w[0] = 127, -127
    out, rates = micro.product(a, w, 1, 2)
    assert torch.equal(out, a.float() @ w.float().t())
    assert (rates > 0).all()


def test_a_wrong_operand_is_refused(extension):
    a, w = torch.randn(4, 32), torch.randn(48, 32)
    for given, text in (
        ((a.half(), w), "not float16"),
        ((a[:, :24], w[:, :24]), "needs a width of a that is a multiple of 16, not 24"),
        ((a, w[:40]), "number of columns"),
        ((a, w[:, :16]), r"needs w of \[48, 32\]"),
    ):
        with pytest.raises(ValueError, match=text):
            micro.product(*given, 1, 1)
    with pytest.raises(ValueError, match="not float64"):
        micro.peak(torch.float64, 1, 1)
    for arguments, text in (
        ((a[0], w, 1, 1), r"a and w are \[M, K\]"),
        ((a[:0], w, 1, 1), "positive multiples"),
        ((a, w, 0, 1), "times and count must be positive"),
        ((a, w.bfloat16(), 1, 1), "w has dtype"),
        ((a.repeat(1, 2)[:, ::2], w, 1, 1), "a is not contiguous"),
    ):
        with pytest.raises(RuntimeError, match=text):
            micro._product(*arguments)
    with pytest.raises(RuntimeError, match="steps and count must be positive"):
        micro._peak(a, 0, 1)


def test_a_quick_run(extension):
    threads = torch.get_num_threads()
    found = micro_bench.measure(QUICK, turns=1, sample_seconds=1e-5)
    assert torch.get_num_threads() == threads
    assert found["unavailable"] is None
    assert found["instruction_set"] in ("avx512_bf16", "avx512", "avx2", "generic")
    assert [(r["case"], r["dtype"]) for r in found["rows"]] == [
        (case.name, dtype) for dtype in ("float32", "bfloat16", "int8") for case in QUICK
    ]
    for r in found["rows"]:
        peak = found["peak_gflop_per_s"][r["dtype"]]
        assert r["fraction_of_peak"] == pytest.approx(r["gflop_per_s"] / peak)
        assert r["holds"] is None
    assert "floor" not in micro_bench.text(found)
    assert max(map(len, micro_bench.text(found).splitlines())) <= 120


def test_the_floor_holds_at_ninety_percent():
    row = micro_bench._row(MicroCase(97, 512, 3072, guarded=True), "float32", 90.0, 100.0)
    assert (row["holds"], row["fraction_of_peak"]) == (True, 0.9)
    row = micro_bench._row(MicroCase(97, 512, 3072, guarded=True), "float32", 89.9, 100.0)
    assert row["holds"] is False
    found = {"unavailable": None, "instruction_set": "x", "floor": FLOOR, "rows": [row]}
    assert "BELOW the floor" in micro_bench.text(found | {"peak_gflop_per_s": {"float32": 100.0}})


def test_the_guarded_shapes():
    assert [c.name for c in CASES if c.guarded] == ["97x512x3072", "97x1536x512", "776x512x512"]


def test_without_the_extension_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda kind: "no C++ compiler")
    found = micro_bench.measure(QUICK)
    assert (found["unavailable"], found["rows"]) == ("no C++ compiler", [])
    assert "no C++ compiler" in micro_bench.text(found)
