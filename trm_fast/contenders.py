"""Ways to run a step, and proof that all of them compute the same.

Owns the contenders (reference, compiled, official), their construction with equal
weights, batch and carry, the parity check that comes before any timing, and what a step keeps for
its backward. Imported by the other modules of the benchmarks and by `suite`.

Dims legend: B batch, L puzzle tokens, S tokens incl. prefix, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_fast import backends
from trm_fast.capture import WARMUP, Capture
from trm_fast.config import ModelConfig
from trm_fast.floor import matmuls
from trm_fast.inference import supervision_steps
from trm_fast.inference_step import borrowed
from trm_fast.losses import ACTLossHead
from trm_fast.model import Model
from trm_fast.official import Official
from trm_fast.workloads import Case

COMPILE = ("auto", "always", "never")
LOSS = "stablemax_cross_entropy"
OFFICIAL = "official"
COMPILED = "official compiled"
OWN_WIDTH = "official, own width"
PRODUCTS = "matmuls only"
ALIGNED = 16  # tokens of two bytes in a row that tensor cores read well
MANY = 128  # boards that a GPU is busy with
SOLVED = ("official", "attention")  # cases whose solving is compiled on a GPU


class ParityError(ValueError):
    """A contender computes something else than the reference: timing it would mean nothing."""


@dataclass(frozen=True)
class Contender:
    """One way to run the step.

    Attributes:
        official: the official code, else ours.
        compiled: under torch.compile with `compiler` as its backend.
        own_width: the official rounding of the inner widths to 256.
        padded: tokens that the official token MLP is given, the missing ones zeros; 0 for its own.
        backend: of our operations.
        policy: of the recursion's memory; None leaves the configuration's.
        quantize: of the products with weights; checked against a reference that does the same.
        products: no model, only the step's matrix products.
        captured: as one CUDA graph, which is how a training runs.
    """

    name: str
    official: bool = False
    compiled: bool = False
    own_width: bool = False
    padded: int = 0
    backend: str = "reference"
    compiler: str = "inductor"
    policy: str | None = None
    quantize: str = "none"
    products: bool = False
    captured: bool = False


def fused(config: ModelConfig, device: torch.device) -> str:
    """The backends beside the reference that "auto" takes there, as a contender's name; or ""."""
    dtype = getattr(torch, config.forward_dtype)
    choices = backends.report("auto", device, dtype, config)
    return " + ".join(sorted({c.implementation for c in choices} - {"reference"}))


def contenders(
    case: Case,
    device: torch.device,
    compiling: str = "auto",
    policies: Sequence[str] = ("save",),
    quantized: Sequence[str] = (),
    step: str = "train",
) -> list[Contender]:
    """The reference first, then the fused operations where there are any for the device.

    The reference runs with policy "save", what is fused with all of `policies`; where nothing is
    fused the reference has the others too. The official code is compiled only where it is run so,
    on CUDA; there it also has a row with its token MLP padded to aligned rows.

    quantized: ways to quantise that what is fused runs with, too.
    compiling: one of COMPILE; "auto" leaves torch.compile out where it takes tens of minutes: on
        the CPU at the official depth, whose unrolled recursion is one C++ program, and of solving
        on a GPU but for the official code in `SOLVED` with one board and many.
    """
    found = [Contender("reference", policy="save")]
    kernels = fused(case.model, device)
    for policy in policies:
        name = (kernels or "reference") + ("" if policy == "save" else f", {policy}")
        if name != "reference":
            backend = "auto" if kernels else "reference"
            found.append(Contender(name, backend=backend, policy=policy))
    if kernels and device.type == "cuda" and step == "train":
        found.append(Contender(f"{kernels}, graph", backend="auto", policy="save", captured=True))
    for way in quantized if kernels else ():
        name = _quantised(case.model, way, device)
        found.append(Contender(name, backend="auto", policy="save", quantize=way))
    compiled = compiling == "always" or (compiling == "auto" and _compiles_soon(case, device, step))
    if compiled and not (compiling == "auto" and device.type == "cuda" and step == "solve"):
        found.append(Contender("reference compiled", compiled=True, policy="save"))
    found.append(Contender(OFFICIAL, official=True))
    if "intermediate_size" in case.config:
        found.append(Contender(OWN_WIDTH, official=True, own_width=True))
    if device.type == "cuda":
        found += _official_on_gpus(case.model, compiled)
    return [*found, Contender(PRODUCTS, products=True)]


def _quantised(config: ModelConfig, way: str, device: torch.device) -> str:
    """What serves in eight bits, as a contender's name; it says where the recursion is plain."""
    config = replace(config, backend="auto", quantize=way)
    dtype = getattr(torch, config.forward_dtype)
    plain = backends.recursion_engine(device, dtype, config) == "reference"
    return f"{fused(config, device)}, {way}{', plain recursion' if plain else ''}"


def _compiles_soon(case: Case, device: torch.device, step: str) -> bool:
    config = case.model
    depth = config.H_cycles * (config.L_cycles + 1) * config.L_layers
    if device.type != "cuda":
        return depth <= 8
    if step != "solve":
        return True
    return case.name in SOLVED and (config.batch_size == 1 or config.batch_size >= MANY)


def _official_on_gpus(config: ModelConfig, compiled: bool) -> list[Contender]:
    """The official code compiled, and with aligned rows of tokens where they are not."""
    found = [Contender(COMPILED, official=True, compiled=True)] if compiled else []
    padded = -(-config.total_len // ALIGNED) * ALIGNED
    if config.mlp_t and padded != config.total_len:
        name = f"{COMPILED if compiled else OFFICIAL}, padded"
        found.append(Contender(name, official=True, compiled=compiled, padded=padded))
    return found


def effective_config(case: Case, contender: Contender) -> ModelConfig:
    """The configuration that this contender really computes."""
    if not contender.own_width:
        return case.model
    return replace(case.model, intermediate_size=None, token_intermediate_size=None)


def build(
    contender: Contender, config: ModelConfig, official: Official | None, device: torch.device
) -> nn.Module:
    """An eager loss head with seeded weights, the same for every contender of one config."""
    torch.manual_seed(0)
    model = Model(config)
    with torch.no_grad():  # a halting head of zeros would hide what it reads
        model.inner.q_head.weight.normal_(std=0.02)  # type: ignore[operator, union-attr]
    reference = ACTLossHead(model, LOSS)
    if not contender.official:
        return reference.to(device)
    assert official is not None
    keep = official.layers._find_multiple
    given = {"intermediate_size", "token_intermediate_size"}
    keys = {k: v for k, v in config.to_dict().items() if k not in given}
    inner = config.intermediate_size
    if inner is not None:
        official.layers._find_multiple = lambda a, b: inner
    try:
        with torch.device(device):
            head = official.loss_head(official.model({**keys, "H_layers": 0}), LOSS)
    finally:
        official.layers._find_multiple = keep
    head.load_state_dict(reference.state_dict())
    if contender.padded:
        _pad_token_mlp(head, contender.padded)
    return head


def _pad_token_mlp(head: nn.Module, tokens: int) -> None:
    """Let the official token MLP multiply matrices of `tokens` columns: aligned rows, equal values.

    97 tokens of two bytes are rows that no GPU reads well; anybody can add this to the code.
    """

    def forward(mlp: Any, x: Tensor) -> Tensor:
        extra = tokens - x.shape[-1]
        gate_up = F.pad(mlp.gate_up_proj.weight.to(x.dtype), (0, extra))
        down = F.pad(mlp.down_proj.weight.to(x.dtype), (0, 0, 0, extra))
        gate, up = F.linear(F.pad(x, (0, extra)), gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)[..., : x.shape[-1]]

    for layer in head.model.inner.L_level.layers:  # type: ignore[union-attr]
        kind = type(layer.mlp_t)
        layer.mlp_t.__class__ = type(f"Padded{kind.__name__}", (kind,), {"forward": forward})


def make_batch(config: ModelConfig, device: torch.device) -> dict[str, Tensor]:
    """Random boards [B, L], all cells labelled."""
    g = torch.Generator().manual_seed(1)
    shape = (config.batch_size, config.seq_len)
    batch = {
        "inputs": torch.randint(1, config.vocab_size, shape, generator=g),
        "labels": torch.randint(2, config.vocab_size, shape, generator=g),
        "puzzle_identifiers": torch.zeros(config.batch_size, dtype=torch.int64),
    }
    return {name: t.to(device, torch.int32) for name, t in batch.items()}


def make_carry(head: nn.Module, config: ModelConfig, batch: dict[str, Tensor]) -> Any:
    """A carry in mid-run: random states, every other item just halted."""
    device = batch["inputs"].device
    g = torch.Generator().manual_seed(2)
    shape = (2, config.batch_size, config.total_len, config.hidden_size)
    y, z = torch.randn(shape, generator=g).to(device, getattr(torch, config.forward_dtype))
    with torch.device(device):
        carry = head.initial_carry(batch)  # type: ignore[operator]
    carry.inner_carry.z_H, carry.inner_carry.z_L = y, z
    carry.halted = torch.arange(config.batch_size, device=device) % 2 == 0
    carry.steps = torch.ones_like(carry.steps)
    carry.current_data = {name: t.roll(1, 0) for name, t in batch.items()}
    return carry


@dataclass
class Entry:
    """A contender ready to run, and its times so far, in seconds.

    first: of a solve its first supervision step alone.  plain: the same as `run` call by call, of
    what may be a graph.  captured: whether `run` replays one; None where none will ever be made.
    saved_bytes: kept for the backward.  peak_bytes: of the device's allocator in a step, this
    contender's own.  launches: kernels of a step, or operations where there are no kernels.
    """

    contender: Contender
    config: ModelConfig
    head: nn.Module
    run: Callable[[], Any]
    first: Callable[[], Any] | None = None
    plain: Callable[[], Any] | None = None
    captured: Callable[[], bool | None] = lambda: None
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    launches: int | None = None

    @property
    def ours(self) -> bool:
        """Whether this is our model."""
        return not (self.contender.official or self.contender.products)

    def let_go(self) -> None:
        """Hold nothing on the device any more; it cannot be run again."""
        self.head, self.first, self.plain = nn.Module(), None, None
        self.run = self.captured = lambda: None


def prepare(
    contender: Contender,
    config: ModelConfig,
    step: str,
    official: Official | None,
    device: torch.device,
) -> Entry:
    """Everything built and put on the device; `run` does one step and returns its outcome."""
    policy = contender.policy or config.policy
    config = replace(config, backend=contender.backend, policy=policy, quantize=contender.quantize)
    if contender.products:
        return Entry(contender, config, nn.Module(), matmuls(config, step, device))
    head = build(contender, config, official, device)
    batch = make_batch(config, device)
    carry = make_carry(head, config, batch)
    head.train(step == "train")
    call: Callable[..., Any] = head if step != "solve" else head.model  # type: ignore[assignment]
    if contender.compiled:
        call = torch.compile(call, dynamic=False, backend=contender.compiler)
    rows = getattr(head.model.inner, "puzzle_emb", None)  # type: ignore[union-attr]

    def train() -> Any:
        head.zero_grad(set_to_none=not contender.captured)
        if rows is not None and rows.local_weights.grad is not None:
            rows.local_weights.grad = (
                rows.local_weights.grad.zero_() if contender.captured else None
            )
        _, loss, _, outputs, _ = call(return_keys=("logits",), carry=carry, batch=batch)
        loss.backward()
        return loss, outputs["logits"]

    def infer() -> Any:
        with torch.inference_mode():
            _, loss, _, outputs, _ = call(return_keys=("logits",), carry=carry, batch=batch)
        return loss, outputs["logits"]

    def solve(steps: int, cuda_graph: bool = True) -> Any:
        if contender.backend == "reference":
            return None, plain_answers(call, batch, steps, device)
        return None, answers(call, batch, steps, cuda_graph)

    if step == "solve":
        run, first = partial(solve, config.halt_max_steps), partial(solve, 1)
        if contender.backend == "reference":
            return Entry(contender, config, head, run, first)
        graph = partial(solves_captured, call, batch)
        plain = partial(solve, config.halt_max_steps, False)
        return Entry(contender, config, head, run, first, plain, graph)
    if contender.captured:
        capture, step_of = captured(train, device)
        plain = partial(step_of, True)
        return Entry(contender, config, head, step_of, None, plain, lambda: capture.captured)
    return Entry(contender, config, head, train if step == "train" else infer)


def captured(step: Callable[[], Any], device: torch.device) -> tuple[Capture, Callable[..., Any]]:
    """The same as one CUDA graph, after a few plain calls; what it returns lies in its place.
    The function that is given back takes whether to go call by call all the same."""
    returned: list[Any] = []

    def body() -> None:
        returned[:] = [step()]

    capture = Capture(body, device)

    def run(plain: bool = False) -> Any:
        capture(plain=plain)
        return returned[0]

    return capture, run


def settle(entry: Entry) -> None:
    """Run until what is captured of an entry is replayed: the graph is what counts.

    Raises:
        RuntimeError: a contender that is one graph has none.
    """
    for _ in range(WARMUP + 1):
        if entry.captured() is not False:
            return
        entry.run()
    if entry.contender.captured and not entry.captured():
        raise RuntimeError("no CUDA graph could be made of it; the log says why")


def solves_captured(model: Any, batch: dict[str, Tensor]) -> bool | None:
    """Whether our model's supervision steps of a batch replay a graph; None where none will."""
    with borrowed(model, len(batch["inputs"])) as step:
        return step.captured if step.captures else None


def answers(model: Any, batch: dict[str, Tensor], steps: int, cuda_graph: bool = True) -> Tensor:
    """Logits [B, L, V] after `steps` supervision steps of our model, as its users get them."""
    for out in supervision_steps(model, batch, steps, cuda_graph):
        logits = out.logits
    return logits


@torch.inference_mode()
def plain_answers(model: Any, batch: dict[str, Tensor], steps: int, device: torch.device) -> Tensor:
    """The same of any model call by call; in evaluation none halts before."""
    with torch.device(device):
        carry = model.initial_carry(batch)
    for _ in range(steps):
        carry, outputs = model(carry=carry, batch=batch)
    return outputs["logits"]


# Relative L2 allowed against the reference. Recursion amplifies rounding, so logits and gradients
# are compared at one cycle of one update (of a solve twice, and twice as much is allowed), and only
# the loss at full depth, of one supervision step: after 16 of them in 16 bits it differs by 10 %.
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2, torch.float64: 1e-8}
LOSS_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float64: 1e-5}
# Of quantised products too: one last bit turns a whole number into the next, and recursion does the
# rest.
COARSE = torch.bfloat16


def outcome(entry: Entry, brief: bool = False) -> dict[str, Tensor]:
    """Loss, logits and every gradient of one step, by name.

    brief: of a solve only the first supervision step.
    """
    settle(entry)
    torch.manual_seed(3)
    loss, logits = entry.first() if brief and entry.first else entry.run()
    if loss is None:
        labels = make_batch(entry.config, logits.device)["labels"].long()
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    found = {"loss": loss, "logits": logits}
    for name, p in entry.head.named_parameters():
        if p.grad is not None:
            found[f"gradient of {name}"] = p.grad
    return {name: t.detach().double().cpu() for name, t in found.items()}


def compare(got: dict[str, Tensor], want: dict[str, Tensor], limit: float, who: str) -> float:
    """The largest relative L2 over the tensors of `want`.

    Raises:
        ParityError: it is above `limit`, or a tensor is missing.
    """
    worst = 0.0
    for name, value in want.items():
        if name not in got or got[name].shape != value.shape:
            raise ParityError(f"{who}: {name} is missing or has another shape; it was not timed")
        error = float((got[name] - value).norm() / value.norm().clamp_min(1e-30))
        if not error <= limit:
            raise ParityError(
                f"{who}: {name} differs from the reference by {error:.1e} (relative L2), allowed "
                f"{limit:.0e}; it was not timed"
            )
        worst = max(worst, error)
    return worst


def check_parity(
    entry: Entry,
    step: str,
    official: Official | None,
    device: torch.device,
    losses: dict[ModelConfig, Tensor] | None = None,
) -> None:
    """Compare with the reference on the same weights, batch and carry; fills `entry.errors`.

    losses: the reference's at full depth by configuration, known and found; they take long.
    """
    config = replace(entry.config, backend="reference", policy="save")
    dtype = getattr(torch, config.forward_dtype) if config.quantize == "none" else COARSE
    reference = Contender("reference", policy="save", quantize=config.quantize)
    who = f"{entry.contender.name}, {step} step"
    shallow = replace(config, H_cycles=1, L_cycles=1)
    limit = LIMITS[dtype]
    if step == "solve":  # twice, so that what is carried over counts
        shallow, limit = replace(shallow, halt_max_steps=2), 2 * limit
    pair = [prepare(c, shallow, step, official, device) for c in (entry.contender, reference)]
    got, want = (outcome(one) for one in pair)
    entry.errors["one_cycle"] = compare(got, want, limit, who)
    losses = {} if losses is None else losses
    if config not in losses:
        plain = prepare(reference, config, step, None, device)
        losses[config] = outcome(plain, brief=True)["loss"]
    got, limit = outcome(entry, brief=True), LOSS_LIMITS[dtype]
    entry.errors["loss"] = compare({"loss": got["loss"]}, {"loss": losses[config]}, limit, who)


def kept_for_backward(entry: Entry) -> int:
    """Bytes that autograd keeps between forward and backward, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in entry.head.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        entry.run()
    return sum(kept.values())
