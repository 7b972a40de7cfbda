"""Triton kernels of trm_fast, installed and imported as `trm_fast.kernels`.

One file per op: its kernels, their host launch, the registered operation and `unsupported`. Modules
here import only torch, triton and each other; `trm_fast.backends` alone imports them, and only
where an NVIDIA GPU is asked for. Reading order: `_common` (what every kernel uses), `launch`
(settings as data, and the launch itself), `registration`, the ops, `report` (what was compiled).
"""

if __name__ != "trm_fast.kernels":
    # The checkout's root is on sys.path (python -m, pytest): do not pose as PyPI's `kernels`.
    raise ImportError("this folder holds trm_fast's Triton kernels: import trm_fast.kernels")
