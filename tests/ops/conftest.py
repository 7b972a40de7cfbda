"""The fixture of every kernel's test."""

from kernel_checks import architecture

__all__ = ["architecture"]
