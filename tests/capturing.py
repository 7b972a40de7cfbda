"""What stands for a CUDA graph where there is no GPU. Imported by tests of captured work."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trm_fast.capture import WARMUP


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class _Recorder(TorchDispatchMode):
    """Takes down every operation below autograd with what it was given and what it returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class Recorded:
    """A `Capture` as CUDA's graphs are, without a GPU: after warm-up the operations of one call are
    taken down, and from then on those are repeated on those very tensors. Python does not run."""

    captures = True
    made = 0  # graphs, by all of them

    def __init__(self, body, device, enabled=True):
        self.body, self.calls, self.graph, self.variant = body, 0, None, None

    @property
    def captured(self):
        return self.graph is not None

    def __call__(self, variant=None, plain=False):
        if variant != self.variant:
            self.reset()
            self.variant = variant
        if self.graph is not None and not plain:
            self._replay()
            return
        self.calls += 1
        with _Recorder() as recorder:
            self.body()
        if self.calls > WARMUP and not plain:
            self.graph = recorder.calls
            Recorded.made += 1

    def reset(self):
        self.graph, self.calls = None, 0

    def _replay(self):
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.graph:
                new = func(*args, **kwargs)
                given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
                for place, value in zip(tensors(out), tensors(new), strict=True):
                    fresh = place.untyped_storage().data_ptr() not in given
                    if fresh and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


class InPlace:
    """A `Capture` whose body must leave every tensor in its place, called plainly all the same."""

    captures, captured = True, False

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
        for t in tensors((args, kwargs, out)):
            assert t.device.type == self.device.type, f"{func}: a tensor on {t.device}"
        self.calls += 1
        return out
