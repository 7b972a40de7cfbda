"""What can be known about Apple GPUs without one.

Three checks on the reference ops and on a whole training step: every aten operation they run has an
MPS kernel (by PyTorch's own table of native functions), nothing is float64 or complex128 there, and
results stay on the device of the inputs. There is no MPS device here, so `pretend_mps` lets tensors
claim to be on one while their memory stays on the CPU: code that asks for a device or a dtype takes
its MPS path. Forward results' devices are checked on fake tensors, which cannot claim anything.

Left out: the numbers that a real Apple GPU gives.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from trm_fast import backends, reference
from trm_fast.ema import EMA
from trm_fast.losses import ACTLossHead
from trm_fast.model import Model
from trm_fast.ops import OP_NAMES, AttentionWeights, BlockWeights, Ops, Recursion, TokenMixWeights
from trm_fast.optim import AdamATan2

MPS = torch.device("mps", 0)
B, P, L, D, H, F, V = 2, 3, 4, 8, 2, 16, 11
S, K = P + L, D // H
EPS = 1e-5
# CPU-only kernels that stand in here for scaled_dot_product_attention, which MPS has its own of.
CPU_STAND_INS = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}
WIDE = (torch.float64, torch.complex128)


@pytest.fixture(scope="module")
def has_mps_kernel():
    """name -> whether PyTorch's table of native functions gives this aten op an MPS kernel."""
    torchgen = pytest.importorskip("torchgen", reason="ships with PyTorch's wheels")
    pytest.importorskip("yaml", reason="reads PyTorch's table; in the test extra")
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DispatchKey

    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    table = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    functions = {str(f.func.name): f for f in table.native_functions}

    def answer(name: str) -> bool:
        function = functions[name]
        if function.structured_delegate is not None:
            function = functions[str(function.structured_delegate)]
        elif (
            function.has_composite_implicit_autograd_kernel
            or function.has_composite_explicit_autograd_kernel
            or function.has_composite_explicit_autograd_non_functional_kernel
        ):
            return True
        return table.backend_indices[DispatchKey.MPS].has_kernel(function)

    return answer


class Recorder(TorchDispatchMode):
    """Names of the aten ops that run, and of those that touch float64 or complex128."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.wide: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.name.startswith("aten::"):
            overload = f".{schema.overload_name}" if schema.overload_name else ""
            name = schema.name.removeprefix("aten::") + overload
            self.names.add(name)
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            if any(t.dtype in WIDE for t in tensors):
                self.wide.add(name)
        return out


class OnCPU(TorchFunctionMode):
    """Calls that ask for the MPS device get the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def real(value):
            is_mps = isinstance(value, torch.device) and value.type == "mps"
            return torch.device("cpu") if is_mps else value

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))


@contextmanager
def pretend_mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Inside, every tensor says that it is on MPS; what runs is recorded."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "device", property(lambda self: MPS), raising=False)
        with OnCPU(), Recorder() as recorder:
            yield recorder


def real(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def fake(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    meta = torch.empty(*shape, dtype=dtype, device="meta")
    return FakeTensor(FAKE, meta, MPS)


FAKE = FakeTensorMode()


def block(make, mixer: str) -> BlockWeights:
    weights = (
        TokenMixWeights(make(2 * F, S), make(S, F))
        if mixer == "mlp_t"
        else AttentionWeights(make(3 * D, D), make(D, D))
    )
    return BlockWeights(weights, make(2 * F, D), make(D, F))


def integers(make, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    if make is fake:
        return fake(*shape, dtype=dtype)
    return torch.randint(high, shape).to(dtype)


def optimizer_step(make, copied: bool) -> list[torch.Tensor]:
    params, grads, averages, squares, emas, copies = (
        [make(D, D, grad=False), make(D, grad=False)] for _ in range(6)
    )
    if not copied:
        copies = []
    reference.adam_atan2_ema_(
        params,
        grads,
        averages,
        [s.abs() for s in squares],
        emas,
        copies,
        lr=1e-3,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        step=3,
        ema_decay=0.9,
    )
    return [*params, *averages, *squares, *emas, *copies]


def recursion(make, mixer: str, policy: str):
    rotary = None if mixer == "mlp_t" else (make(S, K, grad=False), make(S, K, grad=False))
    ops = Ops(**{name: getattr(reference, name) for name in OP_NAMES})
    settings = Recursion(H_cycles=2, L_cycles=2, heads=H, eps=EPS, policy=policy)
    x, y, z = (make(B, S, D) for _ in range(3))
    return reference.deep_recursion(ops, x, y, z, [block(make, mixer)], rotary, settings)


# op -> calls of it on tensors that `make` makes (real ones or fake ones)
CASES = {
    "embed_reset": [
        lambda make: reference.embed_reset(
            integers(make, V, B, L),
            make(B, P, D),
            make(V, D),
            make(S, D),
            integers(make, 2, B, dtype=torch.bool),
            *(make(B, S, D, grad=False) for _ in range(2)),
            *(make(D, grad=False) for _ in range(2)),
            D**0.5,
        )
    ],
    "inject": [lambda make: reference.inject(*(make(B, S, D) for _ in range(3)))],
    "residual_rmsnorm": [
        lambda make: reference.residual_rmsnorm(make(B, S, D), make(B, S, D), -1, EPS),
        lambda make: reference.residual_rmsnorm(make(B, S, D), make(B, S, D), 1, EPS),
    ],
    "swiglu": [lambda make: reference.swiglu(make(B, S, 2 * F))],
    "linear_rmsnorm": [
        lambda make: reference.linear_rmsnorm(make(B, S, F), make(D, F), make(B, S, D), EPS)
    ],
    "swiglu_rmsnorm": [
        lambda make: reference.swiglu_rmsnorm(make(B, S, D), make(2 * F, D), make(D, F), EPS)
    ],
    "token_mix": [lambda make: reference.token_mix(make(B, S, D), make(2 * F, S), make(S, F), EPS)],
    "rope_attention": [
        lambda make: reference.rope_attention(
            make(B, S, 3 * D), (make(S, K, grad=False), make(S, K, grad=False)), H
        )
    ],
    "stablemax_loss": [
        lambda make: reference.stablemax_loss(make(B, L, V), integers(make, V, B, L))
    ],
    "deep_recursion": [
        lambda make: recursion(make, "mlp_t", "save"),
        lambda make: recursion(make, "attention", "save"),
        lambda make: recursion(make, "mlp_t", "light"),
        lambda make: recursion(make, "mlp_t", "recompute"),
    ],
    "adam_atan2_ema_": [
        lambda make: optimizer_step(make, copied=False),
        lambda make: optimizer_step(make, copied=True),
    ],
}
CALLS = [
    pytest.param(call, id=f"{op}-{number}") for op in CASES for number, call in enumerate(CASES[op])
]
# Attention, copies and transposed copies ask for a real device even of fake tensors.
NOT_ON_FAKES = ("rope_attention-", "deep_recursion-", "adam_atan2_ema_-1")
ON_FAKES = [call for call in CALLS if not call.id.startswith(NOT_ON_FAKES)]


def backward(outputs) -> None:
    tensors = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    total = [t.float().square().sum() for t in tensors if t.requires_grad]
    if total:
        torch.stack(total).sum().backward()


def assert_runs_on_mps(recorder: Recorder, has_mps_kernel) -> None:
    assert recorder.names
    assert recorder.wide == set()
    names = recorder.names - CPU_STAND_INS
    assert {name for name in names if not has_mps_kernel(name)} == set()


def test_every_op_has_a_case():
    assert set(CASES) == set(OP_NAMES)


@pytest.mark.parametrize("call", CALLS)
def test_op_has_mps_kernels_and_no_float64(call, has_mps_kernel, monkeypatch):
    with pretend_mps(monkeypatch) as recorder:
        backward(call(real))
    assert_runs_on_mps(recorder, has_mps_kernel)


@pytest.mark.parametrize("call", ON_FAKES)
def test_op_stays_on_the_device(call):
    with FAKE:
        outputs = call(fake)
        tensors = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    assert tensors
    assert {t.device.type for t in tensors} == {"mps"}


@pytest.mark.parametrize("mixer", ["mlp_t", "attention"])
def test_training_step_runs_on_mps(mixer, has_mps_kernel, monkeypatch):
    config = {
        "batch_size": B,
        "seq_len": L,
        "vocab_size": V,
        "num_puzzle_identifiers": 2,
        "hidden_size": D,
        "num_heads": H,
        "expansion": 2.0,
        "intermediate_multiple": 8,
        "H_cycles": 2,
        "L_cycles": 1,
        "L_layers": 1,
        "puzzle_emb_ndim": D,
        "puzzle_emb_len": P,
        "halt_max_steps": 3,
        "halt_exploration_prob": 0.5,
        "pos_encodings": "none" if mixer == "mlp_t" else "rope",
        "mlp_t": mixer == "mlp_t",
        "forward_dtype": "float32",
        "policy": "save",
    }
    with pretend_mps(monkeypatch) as recorder:
        head = ACTLossHead(Model(config), "stablemax_cross_entropy")
        optimizer = AdamATan2(head.parameters(), lr=1e-3)
        averages = EMA(head, 0.9)
        batch = {
            "inputs": torch.randint(V, (B, L), dtype=torch.int32),
            "labels": torch.randint(V, (B, L), dtype=torch.int32),
            "puzzle_identifiers": torch.zeros(B, dtype=torch.int32),
        }
        carry = head.initial_carry(batch)
        for _ in range(2):
            carry, loss, _, _, _ = head(return_keys=[], carry=carry, batch=batch)
            loss.backward()
            optimizer.step()
            averages.update(head)
            optimizer.zero_grad()
    assert torch.isfinite(loss)
    assert_runs_on_mps(recorder, has_mps_kernel)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_backends_choose_without_a_device(name):
    rows = backends.report(name, MPS, torch.float32)
    assert [row.op for row in rows] == list(OP_NAMES)
    assert {row.implementation for row in rows} == {"reference"}


def test_the_checks_can_say_no(has_mps_kernel, monkeypatch):
    assert not has_mps_kernel("_scaled_dot_product_flash_attention_for_cpu")
    with pretend_mps(monkeypatch) as recorder:
        real(2, 2).double().sum()
    assert recorder.wide
    with FAKE:
        x = fake(2, 2)
        assert (x + 1).device.type == "mps"
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(2, 2)
    assert real(1).device.type == "cpu"
