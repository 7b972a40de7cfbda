"""Files of other projects, with their names and shapes, and what their code computes from them.

The computations are written anew, in NumPy and float64, from the projects' sources, so that what
is read can be compared with something that shares no line with it.

Dims legend: B batch, L tokens, S prefix and L, D width (16), H heads, K head dim, F inner width,
V vocabulary.
"""

import math

import numpy as np
import torch
from torch import Tensor

D, F, HEADS, H_CYCLES, L_CYCLES = 16, 256, 2, 2, 3


def draw(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / (shape[-1] if len(shape) > 1 else 1) ** 0.5
        for name, shape in shapes.items()
    }


def block_shapes(prefix: str, tokens: int | None = None) -> dict[str, tuple[int, ...]]:
    """Of one block; with `tokens` its mixer is an MLP over that many."""
    mixer: dict[str, tuple[int, ...]] = {
        "self_attn.qkv_proj.weight": (3 * D, D),
        "self_attn.o_proj.weight": (D, D),
    }
    if tokens:
        mixer = {
            "mlp_t.gate_up_proj.weight": (512, tokens),
            "mlp_t.down_proj.weight": (tokens, 256),
        }
    channel = {"mlp.gate_up_proj.weight": (2 * F, D), "mlp.down_proj.weight": (D, F)}
    return {prefix + name: shape for name, shape in (mixer | channel).items()}


def rs_weights(
    vocabulary: int = 7, layers: int = 2, **changes: tuple[int, ...]
) -> dict[str, Tensor]:
    """What `varmap.save` of tiny-recursive-rs writes."""
    shapes = {
        "embed_tokens.weight": (vocabulary, D),
        "lm_head.weight": (vocabulary, D),
        "h_init": (D,),
        "l_init": (D,),
    }
    for layer in range(layers):
        shapes |= block_shapes(f"l_level.layer_{layer}.")
    return draw(1, {**shapes, **changes})


def nano_weights(
    vocabulary: int, tokens: int | None = None, prefix: int = 0, puzzles: int = 3
) -> dict[str, Tensor]:
    """state_dict of nano-trm's TRMModule; `tokens` (with the prefix) for use_mlp_t."""
    shapes = {
        "z_H_init": (D,),
        "z_L_init": (D,),
        "input_embedding.embedding_weight": (vocabulary, D),
        **block_shapes("lenet.layers.0.", tokens),
        **block_shapes("lenet.layers.1.", tokens),
        "lm_head.weight": (vocabulary, D),
        "q_head.weight": (1, D),
        "q_head.bias": (1,),
    }
    if prefix:
        shapes["puzzle_emb.weights"] = (puzzles, D + 3)
    return draw(2, shapes)


def lucidrains_weights(vocabulary: int = 7, registers: int = 2) -> dict[str, Tensor]:
    """state_dict of lucidrains' TinyRecursiveModel around a network of post-norm blocks."""
    return draw(
        3,
        {
            "output_init_embed": (D,),
            "latent_init_embed": (D,),
            "register_tokens": (registers, D),
            "input_embed.weight": (vocabulary, D),
            **block_shapes("network.layers.0."),
            "to_pred.weight": (vocabulary, D),
            "to_halt_pred.1.weight": (1, D),
        },
    )


def s4nj1th_weights(gates: tuple[int, ...], width: int = 12, layers: int = 3) -> dict[str, Tensor]:
    """model_state_dict of s4nj1th's notebook; gates [1] or []."""
    shapes: dict[str, tuple[int, ...]] = {"latent_gate": gates, "output_gate": gates}
    shapes |= {"input_proj.weight": (width, 810), "input_proj.bias": (width,)}
    for stack, count in (("latent_layers", layers), ("output_layers", 2)):
        for i in range(count):
            net = f"{stack}.{i}.net."
            shapes |= {f"{net}0.weight": (width,), f"{net}0.bias": (width,)}
            shapes |= {f"{net}1.weight": (4 * width, width), f"{net}1.bias": (4 * width,)}
            shapes |= {f"{net}4.weight": (width, 4 * width), f"{net}4.bias": (width,)}
    shapes |= {"output_proj.weight": (729, width), "output_proj.bias": (729,)}
    return draw(4, shapes)


# What the projects compute


def _rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def _swiglu(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gate, up = np.split(x @ gate_up.T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


def _rotated(x: np.ndarray) -> np.ndarray:
    """Rotary positions 0, 1, ... of x [B, S, H, K]: halves turned against each other."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = (f(angles)[:, None] for f in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)


def _attention(x: np.ndarray, qkv: np.ndarray, out: np.ndarray) -> np.ndarray:
    batch, length, width = x.shape
    parts = (x @ qkv.T).reshape(batch, length, 3, HEADS, width // HEADS)
    q, k, v = _rotated(parts[:, :, 0]), _rotated(parts[:, :, 1]), parts[:, :, 2]
    scores = np.einsum("bihk,bjhk->bhij", q, k) / (width // HEADS) ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhij,bjhk->bihk", weights, v).reshape(x.shape) @ out.T


class Foreign:
    """The shared network of these projects: `prefix` and a number name its blocks."""

    def __init__(self, weights: dict[str, Tensor], prefix: str) -> None:
        self.w = {name: value.double().numpy() for name, value in weights.items()}
        self.prefix = prefix
        self.layers = 1 + max(
            int(name.removeprefix(prefix).split(".")[0])
            for name in self.w
            if name.startswith(prefix)
        )

    def network(self, x: np.ndarray) -> np.ndarray:
        for layer in range(self.layers):
            w = {
                name.removeprefix(f"{self.prefix}{layer}.").removesuffix(".weight"): value
                for name, value in self.w.items()
                if name.startswith(f"{self.prefix}{layer}.")
            }
            if "mlp_t.down_proj" in w:
                turned = x.swapaxes(1, 2)
                mixed = _swiglu(turned, w["mlp_t.gate_up_proj"], w["mlp_t.down_proj"])
                x = _rms(turned + mixed).swapaxes(1, 2)
            else:
                x = _rms(x + _attention(x, w["self_attn.qkv_proj"], w["self_attn.o_proj"]))
            x = _rms(x + _swiglu(x, w["mlp.gate_up_proj"], w["mlp.down_proj"]))
        return x

    def step(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All cycles of one supervision step."""
        for _ in range(H_CYCLES):
            for _ in range(L_CYCLES):
                z = self.network(z + y + x)
            y = self.network(y + z)
        return y, z


def rs_logits(weights: dict[str, Tensor], tokens: Tensor, start: str = "zeros") -> np.ndarray:
    """Logits [B, L, V] of one forward of tiny-recursive-rs, from zeros or h_init and l_init."""
    model = Foreign(weights, "l_level.layer_")
    x = model.w["embed_tokens.weight"][tokens.numpy()] * D**0.5
    y, z = np.zeros_like(x), np.zeros_like(x)
    if start == "init":
        y, z = y + model.w["h_init"], z + model.w["l_init"]
    return model.step(x, y, z)[0] @ model.w["lm_head.weight"].T


def nano_outputs(
    weights: dict[str, Tensor], tokens: Tensor, puzzles: Tensor, prefix: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """(logits [B, L, V], halting logits [B]) of nano-trm after `steps` supervision steps."""
    model = Foreign(weights, "lenet.layers.")
    x = model.w["input_embedding.embedding_weight"][tokens.numpy()]
    if prefix:
        rows = model.w["puzzle_emb.weights"][puzzles.numpy()]
        rows = np.pad(rows, ((0, 0), (0, prefix * D - rows.shape[1])))
        x = np.concatenate((rows.reshape(len(rows), prefix, D), x), 1)
    x = x * D**0.5
    y, z = (np.zeros_like(x) + model.w[name] for name in ("z_H_init", "z_L_init"))
    for _ in range(steps):
        y, z = model.step(x, y, z)
    q = y[:, 0] @ model.w["q_head.weight"].T + model.w["q_head.bias"]
    return y[:, prefix:] @ model.w["lm_head.weight"].T, q[:, 0]


def s4nj1th_digits(
    weights: dict[str, Tensor], boards: Tensor, version: str, h_cycles: int, l_cycles: int
) -> np.ndarray:
    """Logits [B, 81, 9] for boards [B, 81] of digits, 0 empty; v1 as main.py, head as the notebook
    has it since."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    erf = np.vectorize(math.erf)

    def stack(name: str, h: np.ndarray) -> np.ndarray:
        gate = w[f"{name}_gate"]
        gate = 1 / (1 + np.exp(-gate)) if version == "head" else gate
        for block in range(sum(n.startswith(f"{name}_layers") for n in w) // 6):
            net = f"{name}_layers.{block}.net."
            a = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
            a = (a * w[f"{net}0.weight"] + w[f"{net}0.bias"]) @ w[f"{net}1.weight"].T
            a = a + w[f"{net}1.bias"]
            a = a * (1 + erf(a / 2**0.5)) / 2
            h = h + gate * (a @ w[f"{net}4.weight"].T + w[f"{net}4.bias"])
        return h

    onehot = np.eye(10)[boards.numpy()].reshape(len(boards), 810)
    x = onehot @ w["input_proj.weight"].T + w["input_proj.bias"]
    start = x if version == "head" else 0 * x
    y, z = start, start
    rounds = [1] * (1 + h_cycles) if version == "head" else [l_cycles] * h_cycles
    for inner in rounds:
        for _ in range(inner):
            z = stack("latent", x + y + z)
        y = stack("output", y + z)
    logits = y @ w["output_proj.weight"].T + w["output_proj.bias"]
    return logits.reshape(len(boards), 81, 9)


def lucidrains_outputs(
    weights: dict[str, Tensor], tokens: Tensor, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """(logits [B, L, V], halting logits [B]) of lucidrains' model after `steps` refinements."""
    model = Foreign(weights, "network.layers.")
    x = model.w["input_embed.weight"][tokens.numpy()]
    registers = model.w["register_tokens"]
    x = np.concatenate((np.broadcast_to(registers, (len(x), *registers.shape)), x), 1)
    y, z = (np.zeros_like(x) + model.w[f"{n}_init_embed"] for n in ("output", "latent"))
    for _ in range(steps):
        y, z = model.step(x, y, z)
    logits = y[:, len(registers) :] @ model.w["to_pred.weight"].T
    return logits, y.mean(1) @ model.w["to_halt_pred.1.weight"][0]
