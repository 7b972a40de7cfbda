"""The compiled extension: its build, and one file per op that registers it with PyTorch.

C++ supplies implementations only; schemas, fake tensors and gradients are made here, by the helper
that the Triton kernels use too. Importing builds and loads nothing; `library` does, where it is
asked to. Reading order: `build` (compilers), `cache` (what they made), `library` (loading),
`_common` (checks), the ops. `trm_fast.backends` alone imports the ops.
"""
