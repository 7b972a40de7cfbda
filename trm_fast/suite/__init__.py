"""The GPU measuring suite: what `bench/gpu_suite.py` runs, in three stages.

A, is it right, and what is possible: ceilings, correctness, the official baselines. B, how fast is
it: operations, launch settings, steps, inference. C, why: profiler counters, memory checks, a
second round of settings. Imported by `bench/gpu_suite.py`.

Reading order: `predictions`, `records`, `supervisor` (these load neither torch nor triton),
`session`, then the items in `ceilings`, `truth`, `steps`, `speed`, `tuning` and `why`, and
`stages`, which puts them in order.
"""
