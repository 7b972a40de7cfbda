"""Records what the official code computes: `python tests/golden/record.py --official PATH`.

Owns: recorded.json and the .safetensors files beside it. Deterministic: a second run on the same
machine writes the same bytes. Run it again when cases.py changes.
Imported by nobody; `recording.py` runs the model cases, this file the smaller recordings (initial
weights, losses, puzzle rows, optimizer, EMA, learning rate) and the writing.
Source: the official checkout; AdamATan2 (closed source there) by its published update in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from golden.cases import (  # noqa: E402
    CASES,
    INITIAL,
    digest,
    fill_weights,
    gradients,
    make_batch,
    run_step,
    step_seed,
)
from golden.recording import flatten, official_head, record_case  # noqa: E402
from official import (  # noqa: E402
    OFFICIAL_COMMIT,
    Official,
    commit_of,
    hashes_of,
    load_official,
)
from parity import portable_integers, portable_uniform, splitmix  # noqa: E402

Tensors = dict[str, torch.Tensor]


def erfinv_probe() -> str:
    """Hash of erfinv on a fixed grid: initial weights are bitwise portable where this agrees."""
    return digest(torch.linspace(-0.95, 0.95, 4001).erfinv())


def record_initial(official: Official) -> dict[str, Any]:
    """Per config: every state_dict entry's shape, dtype and sha256 for seed 0, generator after."""
    recorded = {}
    for name, config in INITIAL.items():
        torch.manual_seed(0)
        model = official.model(config)
        recorded[name] = {
            "config": config,
            "random": digest(torch.get_rng_state()),
            "parameters": [n for n, _ in model.named_parameters()],
            "buffers": [n for n, _ in model.named_buffers()],
            "parameter_count": sum(p.numel() for p in model.parameters()),
            "state": {
                key: {
                    "shape": list(value.shape),
                    "dtype": str(value.dtype).removeprefix("torch."),
                    "sha256": digest(value),
                    "norm": float(f"{float(value.double().norm()):.9g}"),
                    "first": value.double().reshape(-1)[:3].tolist(),
                }
                for key, value in model.state_dict().items()
            },
        }
    return recorded


def record_losses(official: Official) -> Tensors:
    """Both loss functions on logits with the awkward values: exact 0 and 1, ties, large."""
    logits = portable_uniform((4, 6, 9), 3.0, 11, "logits").float()
    logits[0, 0] = 1.0
    logits[0, 1] = 0.0
    logits[0, 2] = torch.arange(9) - 4.0
    logits[0, 3] = logits[0, 3] * 1e4
    logits[0, 4, :3] = 1.0
    labels = portable_integers((4, 6), 0, 9, 12, "labels")
    labels[1, 3:] = -100
    labels[3] = -100
    recorded = {"logits": logits, "labels": labels}
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("stablemax", "softmax"):
            leaf = logits.to(dtype, copy=True).requires_grad_()
            loss = getattr(official.losses, f"{kind}_cross_entropy")(leaf, labels)
            weight = portable_uniform((4, 6), 1.0, 13, "weight").to(loss.dtype)
            (loss * weight).sum().backward()
            name = f"{kind}/{str(dtype).removeprefix('torch.')}"
            assert leaf.grad is not None
            recorded |= {f"{name}/loss": loss.detach(), f"{name}/grad": leaf.grad}
            recorded["weight"] = portable_uniform((4, 6), 1.0, 13, "weight")
    return recorded


def record_rows(official: Official) -> Tensors:
    """Two SignSGD steps on puzzle rows: repeated ids, the blank id, gradients that cancel."""
    table = official.sparse_embedding.CastedSparseEmbedding(
        7, 5, batch_size=6, init_std=0, cast_to=torch.float32
    )
    table.weights.copy_(portable_uniform((7, 5), 0.5, 21, "rows"))
    optimizer = official.SignSGD(table.buffers(), lr=0.01, weight_decay=0.1, world_size=1)
    recorded = {"before": table.weights.clone()}
    for step, ids in enumerate(([0, 3, 3, 0, 5, 3], [6, 0, 6, 1, 1, 1])):
        table.local_ids.copy_(torch.tensor(ids))
        grad = portable_uniform((6, 5), 1.0, 22, f"grad{step}").float()
        grad[0, 2] = 0.25
        grad[3, 2] = -0.25
        grad[1:3, 0] = torch.tensor([0.5, -2.0])
        grad[4, 4] = 0.0
        table.local_weights.grad = grad
        optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        optimizer.step()
        recorded |= {f"{step}/ids": table.local_ids.clone(), f"{step}/grad": grad.clone()}
        recorded[f"{step}/after"] = table.weights.clone()
    return recorded


def atan2_loop(
    param: list[float],
    grads: list[list[float]],
    rates: list[float],
    decay: float,
    beta1: float,
    beta2: float,
) -> list[list[float]]:
    """AdamATan2, one number at a time: decay, then p -= lr/bc1 * atan2(m, sqrt(v/bc2))."""
    p, m, v = list(param), [0.0] * len(param), [0.0] * len(param)
    trajectory = []
    for t, (grad, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        bias1, bias2 = 1.0 - beta1**t, 1.0 - beta2**t
        for i, g in enumerate(grad):
            m[i] += (1.0 - beta1) * (g - m[i])
            v[i] += (1.0 - beta2) * (g * g - v[i])
            p[i] *= 1.0 - lr * decay
            p[i] -= lr / bias1 * math.atan2(m[i], math.sqrt(v[i]) / math.sqrt(bias2))
        trajectory.append(list(p))
    return trajectory


# Weight decay and betas of the recorded run; the learning rate differs in every step.
ADAM = {"weight_decay": 0.5, "beta1": 0.9, "beta2": 0.95}
ADAM_RATES = [1e-3, 2e-3, 3e-3, 2.5e-3, 1e-2]
ADAM_PARAMS = (
    "inner.embed_tokens.embedding_weight",
    "inner.lm_head.weight",
    "inner.q_head.weight",
    "inner.q_head.bias",
)


def record_adam(official: Official) -> Tensors:
    """Gradients of five official steps (these parameters move), the float64 trajectory beside."""
    config = CASES["attn-rope"].official_config
    head = official_head(official, config, "stablemax_cross_entropy").train()
    fill_weights(head.model, 31)
    # Token 0 is in no input: the gradient of its row is exactly zero throughout.
    params = {n: p for n, p in head.model.named_parameters() if n in ADAM_PARAMS}
    start = {n: p.detach().double() for n, p in params.items()}
    flat: dict[str, list[list[float]]] = {n: [] for n in params}
    recorded = {f"start/{n}": p.detach().clone() for n, p in params.items()}
    carry = head.initial_carry(make_batch(config, 31, 0))
    for step in range(len(ADAM_RATES)):
        batch = make_batch(config, 31, step)
        carry, _ = run_step(head, carry, batch, step_seed(31, step))
        grads = gradients(head.model)
        for name, param in params.items():
            recorded[f"{step}/grad/{name}"] = grads[name].clone()
            flat[name].append(grads[name].double().reshape(-1).tolist())
            path = atan2_loop(
                start[name].reshape(-1).tolist(),
                flat[name],
                ADAM_RATES[: step + 1],
                ADAM["weight_decay"],
                ADAM["beta1"],
                ADAM["beta2"],
            )
            after = torch.tensor(path[-1], dtype=torch.float64).reshape(param.shape)
            recorded[f"{step}/after/{name}"] = after
            param.data.copy_(after)
    return recorded


def record_ema(official: Official) -> Tensors:
    """The official EMA over four updates of a module that also has a buffer."""
    module = nn.Linear(5, 3)
    module.register_buffer("fixed", torch.ones(2))
    helper = official.ema.EMAHelper(mu=0.9)
    recorded = {}
    for step in range(5):
        for name, param in module.named_parameters():
            param.data.copy_(portable_uniform(param.shape, 1.0, 41 + step, name))
            recorded[f"{step}/param/{name}"] = param.detach().clone()
        if step == 0:
            helper.register(module)
        else:
            helper.update(module)
        recorded |= {f"{step}/ema/{n}": s.clone() for n, s in helper.shadow.items()}
    return recorded


def record_schedule(official: Official) -> list[list[float]]:
    """Rows (step, base_lr, warmup, total, min_ratio, learning rate)."""
    rows = []
    for base, warmup, total, ratio in (
        (1e-4, 2000, 65104, 1.0),
        (1e-4, 2000, 65104, 0.1),
        (3e-3, 0, 100, 0.0),
        (1e-2, 7, 50, 0.25),
    ):
        for step in sorted({0, 1, 2, warmup - 1, warmup, warmup + 1, total // 2, total - 1, total}):
            if step >= 0:
                rate = official.pretrain.cosine_schedule_with_warmup_lr_lambda(
                    step,
                    base_lr=base,
                    num_warmup_steps=warmup,
                    num_training_steps=total,
                    min_ratio=ratio,
                )
                rows.append([step, base, warmup, total, ratio, rate])
    return rows


def write(name: str, tensors: Tensors) -> int:
    data = save({k: tensors[k].contiguous() for k in sorted(tensors)})
    (HERE / f"{name}.safetensors").write_bytes(data)
    return len(data)


def _lines(text: dict[str, Any]) -> str:
    """JSON with one line per case, so that a difference names it."""
    parts = []
    for key, value in text.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", required=True, metavar="PATH", help="the official checkout")
    parser.add_argument("--commit", help="its commit, where it has no .git")
    args = parser.parse_args()
    torch.set_num_threads(1)
    official = load_official(args.official)
    text: dict[str, Any] = {
        "official": "https://github.com/SamsungSAILMontreal/TinyRecursiveModels",
        "commit": args.commit or commit_of(args.official) or OFFICIAL_COMMIT,
        "sha256": hashes_of(args.official),
        "torch": torch.__version__,
        "splitmix": f"{int(splitmix(3, 5, 'probe')[2]):016x}",
        "erfinv": erfinv_probe(),
        "cases": {},
    }
    sizes = {}
    for name, case in CASES.items():
        tensors, text["cases"][name] = flatten(record_case(official, case))
        sizes[name] = write(name, tensors)
    for name, tensors in {
        "losses": record_losses(official),
        "rows": record_rows(official),
        "adam": record_adam(official),
        "ema": record_ema(official),
    }.items():
        sizes[name] = write(name, tensors)
    text["schedule"] = record_schedule(official)
    text["initial"] = record_initial(official)
    sizes["recorded.json"] = (HERE / "recorded.json").write_text(_lines(text))
    for name, size in sizes.items():
        sys.stdout.write(f"{size / 1024:8.1f} KiB  {name}\n")
    sys.stdout.write(f"{sum(sizes.values()) / 1024:8.1f} KiB  in all\n")


if __name__ == "__main__":
    main()
