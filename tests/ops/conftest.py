"""The fixtures of the kernels' tests."""

from kernel_checks import architecture

__all__ = ["architecture"]
