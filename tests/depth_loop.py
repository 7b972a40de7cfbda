"""TRM's training by hand: one supervision step after another in a few lines of plain autograd.

What the options of training change stands here once more, written from the papers' formulas and
sharing nothing with the package but the numbers that are drawn. Imported by test_depth_options.py.

Dims legend: B batch, K latents, L tokens, D width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F

from trm_fast import noise

EPS = 1e-5


def rms_norm(h, axis):
    return h / (h.square().mean(axis, keepdim=True) + EPS).sqrt()


def swiglu(h, gate_up, down):
    gate, up = (h @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def cell_losses(logits, labels):
    """Stablemax cross entropy, [..., L]; 0 where the label is -100."""
    s = torch.where(logits < 0, 1 / (1 - logits.clamp(max=0)), logits.clamp(min=0) + 1)
    log_p = (s / s.sum(-1, keepdim=True)).log()
    known = labels != -100
    return -log_p.gather(-1, labels.clamp(min=0).long()[..., None])[..., 0] * known, known


class HandLoop:
    """Steps of a model with mlp_t, no prefix and one block, in float64.

    Args:
        model: whose weights are copied.  config: of it.
        decay: of the loss by supervision step.  cycles: H and L of a stage, or None.
    """

    def __init__(self, model, decay=1.0, cycles=None):
        self.config, self.decay = model.config, decay
        self.H, self.L = cycles or (model.config.H_cycles, model.config.L_cycles)
        copies = {n.removeprefix("inner."): v.clone() for n, v in model.state_dict().items()}
        names = [n.removeprefix("inner.") for n, _ in model.named_parameters()]
        self.weights = {n: copies[n].requires_grad_() for n in names}
        self.starts = {n: v for n, v in copies.items() if n not in names}
        self.carry = None

    def network(self, h):
        w = self.weights
        token = "L_level.layers.0.mlp_t.gate_up_proj", "L_level.layers.0.mlp_t.down_proj"
        channel = "L_level.layers.0.mlp.gate_up_proj", "L_level.layers.0.mlp.down_proj"
        mixed = swiglu(h.transpose(1, 2), *(w[f"{n}.weight"] for n in token)).transpose(1, 2)
        h = rms_norm(h + mixed, 1)
        return rms_norm(h + swiglu(h, *(w[f"{n}.weight"] for n in channel)), -1)

    def cycle(self, x, y, z, drawn):
        share, deviation = self.config.damping, self.config.noise

        def update(old, injected):
            new = (1 - share) * old + share * self.network(old + injected)
            return new + deviation * next(drawn) if deviation else new

        for _ in range(self.L):
            z = update(z, y + x)
        return update(y, z), z

    def recurse(self, x, y, z, drawn):
        with torch.no_grad():
            for _ in range(self.H - 1):
                y, z = self.cycle(x, y, z, drawn)
        return self.cycle(x, y, z, drawn)

    def take(self, batch, streams):
        """Halted boards get new data and states."""
        size, length = batch["inputs"].shape
        shape = size, length, self.config.hidden_size
        inits = self.starts["L_init"][None]
        if self.config.latents > 1:
            inits = torch.cat([inits, self.starts["L_init_more"]])
        y = self.starts["H_init"].expand(shape)
        z = inits[:, None].expand(size, len(inits), *shape[1:])
        if self.config.random_init:
            like = torch.empty(shape, dtype=torch.float64)
            y = noise.truncated_normal(streams, 0, like)
            z = noise.truncated_normal(streams, 1, like)[:, None]
        if self.carry is None:
            self.carry = dict(batch), y, z, torch.zeros(size)
            return
        data, old_y, old_z, steps = self.carry
        new = self.halted
        data = {n: torch.where(new[:, None], batch[n], data[n]) for n in ("inputs", "labels")}
        y = torch.where(new.view(-1, 1, 1), y, old_y)
        z = torch.where(new.view(-1, 1, 1, 1), z, old_z)
        self.carry = data, y, z, torch.where(new, 0, steps)

    def step(self, batch, streams):
        """Loss of a supervision step, its gradients added to those of the weights."""
        self.take(batch, streams)
        data, y, z, steps = self.carry
        like, count = torch.empty(y.shape, dtype=torch.float64), z.shape[1]

        def fields():
            field = 2
            while True:
                yield noise.normal(streams, field, like)
                field += 1

        w = self.weights
        x = math.sqrt(self.config.hidden_size) * w["embed_tokens.embedding_weight"][data["inputs"]]
        ends = [self.recurse(x, y, z[:, k], fields()) for k in range(count)]
        answers = torch.stack([end[0] for end in ends], 1)  # [B, K, L, D]
        losses, known = cell_losses(
            answers @ w["lm_head.weight"].T, data["labels"][:, None].expand(-1, count, -1)
        )
        per_item = losses.sum(-1) / known.sum(-1)
        winner = per_item.argmin(1)
        rows = torch.arange(len(winner))
        y = answers[rows, winner]
        steps = steps + 1
        q = (y[:, 0] @ w["q_head.weight"].T + w["q_head.bias"])[:, 0].float()  # as published
        right = ((y @ w["lm_head.weight"].T).argmax(-1) == data["labels"]) | ~known[:, 0]
        solved = right.all(-1).float()
        q_loss = F.binary_cross_entropy_with_logits(q, solved, reduction="sum")
        weights = self.decay ** (steps - 1).double()
        loss = (per_item[rows, winner] * weights).sum() + 0.5 * q_loss
        loss.backward()
        new_z = torch.stack([end[1] for end in ends], 1)
        self.carry = data, y.detach(), new_z.detach(), steps
        self.halted = steps >= self.config.halt_max_steps
        if self.config.act_enabled:
            self.halted = self.halted | (q.detach() > 0)
        self.winner = winner
        return loss.detach()
