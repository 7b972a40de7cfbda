"""Triton kernels of trm_fast, installed and imported as `trm_fast.kernels`.

Owns nothing yet: the kernels come with a later version, one file per op. Modules here import only
torch, triton and each other; `trm_fast.backends` alone imports them.
"""

if __name__ != "trm_fast.kernels":
    # The checkout's root is on sys.path (python -m, pytest): do not pose as PyPI's `kernels`.
    raise ImportError("this folder holds trm_fast's Triton kernels: import trm_fast.kernels")
