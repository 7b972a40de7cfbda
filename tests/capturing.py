"""What stands for a CUDA graph where there is no GPU. Imported by tests of captured work."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class InPlace:
    """A `Capture` whose body must leave every tensor in its place, called plainly all the same."""

    captures = True

    def __init__(self, body, device, enabled=True):
        self.body = body

    def __call__(self, variant=None, plain=False):
        self.body()

    def reset(self):
        pass


class NeverWaits(TorchDispatchMode):
    """Refuses what the host would have to wait for, and what is not on the device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.calls = torch.device(device), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        forbidden = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):
            by_mask = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            forbidden = {} if not by_mask else forbidden | set(func.tags)
        assert not set(forbidden) & set(func.tags), f"{func} needs to see the data"
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor is made on the host"
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, torch.Tensor):
                assert t.device.type == self.device.type, f"{func}: a tensor on {t.device}"
        self.calls += 1
        return out
