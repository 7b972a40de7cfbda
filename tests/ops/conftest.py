"""The fixtures of the kernels' tests."""

from extension_checks import extension, threads
from kernel_checks import architecture

__all__ = ["architecture", "extension", "threads"]
