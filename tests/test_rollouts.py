"""Rollouts against hand-written loops; halting, schedules, budgets, and what changes nothing."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from answering import DEPTH, boards, tiny_model, with_given
from capturing import InPlace

from trm_fast import inference, inference_step, rollouts
from trm_fast.inference_step import InferenceStep
from trm_fast.lanes import Puzzles
from trm_fast.noise import normal, truncated_normal
from trm_fast.philox import philox
from trm_fast.puzzle_kind import kind_of
from trm_fast.recursion import named, state_of
from trm_fast.rollouts import Rollouts

N, K, D, SEED = 5, 4, 6, 11
INPUTS = torch.as_tensor(boards(N), dtype=torch.int32)
BLANKED = torch.where(
    torch.rand(N, 16, generator=torch.Generator().manual_seed(0)) < 0.6, 1, INPUTS
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def drawn(purpose, rollout, step, count):
    """Words for puzzles 0..N-1: the counter of the generator, spelled out."""
    position = torch.arange(-(-count // 4)) + (purpose << 24)
    shape = (N, len(position))
    counter = (
        torch.full(shape, rollout),
        torch.full(shape, step),
        torch.arange(N)[:, None].expand(shape),
        position.expand(shape),
    )
    return torch.stack(philox(counter, (SEED, 0)), -1).flatten(1)[:, :count]


def of_all(purpose, field, step, like, transform):
    """[K * N, ...] numbers of all rollouts, rollout by rollout."""
    found = []
    for k in range(K):
        words = drawn(purpose, k, step, 2)
        found.append(transform((words[:, 0] << 32) + words[:, 1], field, like[:N]))
    return torch.cat(found)


@torch.no_grad()
def by_hand(model, inputs, steps=D, noise=0.0, noise_on=("z_L",), random=False):
    """(tokens, q, logits) of each step, K copies of each puzzle as one batch, rollout by rollout.

    The published loop: first states, then before every step z += sigma * N(0, 1).
    """
    batch = {
        "inputs": inputs.repeat(K, 1),
        "puzzle_identifiers": torch.zeros(K * N, dtype=torch.int32),
    }
    inner, found = model.inner, []
    everyone, nobody = torch.ones(K * N, dtype=torch.bool), torch.zeros(K * N, dtype=torch.bool)
    carry = inner.reset_carry(everyone, inner.empty_carry(K * N))
    if random:
        states = {
            name: of_all(2, place, 0, carry.z_H, truncated_normal)
            for place, name in enumerate(("z_H", "z_L"))
        }
        carry = state_of(states)
    # Purpose 2 is first states, 3 noise; the answer's state has the first field.
    for step in range(steps):
        states = named(carry)
        for place, name in enumerate(("z_H", "z_L")):
            if noise and name in noise_on:
                added = of_all(3, place, step, states[name], normal) * noise
                states[name] = states[name] + added
        carry, logits, (q, _) = inner(state_of(states), batch, nobody)
        found.append((with_given(model, batch["inputs"], logits.argmax(-1)), q, logits.float()))
    return found


def stacked(found):
    """tokens [N, K, D, L], q [N, K, D], logits."""
    return [
        torch.stack(column, 1).unflatten(0, (K, N)).transpose(0, 1)
        for column in zip(*found, strict=True)
    ]


def test_ptrm_is_its_published_procedure(model):
    """K noisy copies, D steps, the copy of highest q at the end."""
    found = model.predict(
        BLANKED, reasoning="ptrm", rollouts=K, depth=D, noise=0.7, seed=SEED, batch_size=64
    )
    tokens, q, _ = stacked(by_hand(model, BLANKED, noise=0.7))
    best = q[:, :, -1].argmax(-1)
    rows = torch.arange(N)
    assert torch.equal(found.tokens, tokens[rows, best, -1])
    assert torch.equal(found.q, q[rows, best, -1])
    assert torch.equal(found.rollout, best) and found.step.tolist() == [D] * N
    assert found.passes.tolist() == [K * D] * N
    assert len({tuple(t) for t in tokens[:, :, -1].reshape(N * K, -1).tolist()}) > N
    mode = model.predict(
        BLANKED, reasoning="ptrm", rollouts=K, depth=D, noise=0.7, seed=SEED, select="mode"
    )
    for p in range(N):
        said = [tuple(t) for t in tokens[p, :, -1].tolist()]
        assert said.count(tuple(mode.tokens[p].tolist())) == max(map(said.count, said))


def test_eqr_is_its_published_procedure(model):
    """Independent random starts, the one whose logits moved least over its last three steps."""
    found = model.predict(BLANKED, reasoning="eqr", rollouts=K, depth=D, seed=SEED, batch_size=64)
    tokens, q, logits = stacked(by_hand(model, BLANKED, random=True))
    moved = (logits[:, :, 1:] - logits[:, :, :-1]).norm(dim=-1).mean(-1)
    best = moved[:, :, -3:].mean(-1).argmin(-1)
    rows = torch.arange(N)
    assert torch.equal(found.rollout, best)
    assert torch.equal(found.tokens, tokens[rows, best, -1])
    assert torch.equal(found.q, q[rows, best, -1])
    assert len(set(best.tolist())) > 1


@pytest.mark.parametrize("noise_on", ["z_H", "both"])
def test_noise_on_other_states(model, noise_on):
    found = model.predict(
        BLANKED, rollouts=K, depth=3, noise=0.5, noise_on=noise_on, seed=SEED, init="random"
    )
    names = ("z_H", "z_L") if noise_on == "both" else ("z_H",)
    _, q, _ = stacked(by_hand(model, BLANKED, 3, 0.5, names, random=True))
    assert torch.equal(found.q, q.flatten(1).amax(-1))


def images_by_hand(model, inputs, steps=D):
    """tokens and q of every rollout by symmetry, puzzle by puzzle."""
    kind = kind_of(model.config)
    tokens, qs = [], []
    for k in range(K):
        words = drawn(1, k, 0, kind.words)
        image = kind.images(torch.full((N,), k), words)
        batch = {
            "inputs": image.apply(inputs),
            "puzzle_identifiers": torch.zeros(N, dtype=torch.int32),
        }
        outs = list(inference.supervision_steps(model, batch, steps))
        back = [image.inverse().apply(out.preds) for out in outs]
        tokens.append(torch.stack([with_given(model, inputs, t) for t in back], 1))
        qs.append(torch.stack([out.q for out in outs], 1))
    return torch.stack(tokens, 1), torch.stack(qs, 1)


def threshold_of(q):
    """One that some puzzles pass at their first rollout, some later, some never."""
    return float(q.flatten(1).amax(-1).sort().values[1])


def test_restarts_in_sequence(model):
    tokens, q = images_by_hand(model, BLANKED)
    limit = threshold_of(q)
    found = model.predict(
        BLANKED, reasoning="restarts", rollouts=K, depth=D, seed=SEED, threshold=limit
    )
    places = []
    for p in range(N):
        over = [(k, d) for k in range(K) for d in range(D) if q[p, k, d] > limit]
        if over:
            k, d = over[0]
            passes = k * D + d + 1
        else:
            k, d = divmod(int(q[p].argmax()), D)
            passes = K * D
        places.append((k, over == []))
        assert (int(found.rollout[p]), int(found.step[p])) == (k, d + 1)
        assert torch.equal(found.tokens[p], tokens[p, k, d])
        assert float(found.q[p]) == pytest.approx(float(q[p, k, d]), rel=1e-5)
        assert int(found.passes[p]) == passes
    assert len(set(places)) > 1, "all puzzles alike show nothing"


def test_parallel_rollouts_end_at_the_first_answer(model):
    tokens, q = images_by_hand(model, BLANKED)
    limit = threshold_of(q)
    for width in (1, 3, 64):
        found = model.predict(
            BLANKED, rollouts=K, depth=D, seed=SEED, threshold=limit, select="first-q",
            batch_size=width,
        )  # fmt: skip
        for p in range(N):
            over = (q[p] > limit).nonzero().tolist()
            first = min((d for _, d in over), default=None)
            if first is None:
                assert int(found.passes[p]) == K * D
                continue
            k = max((k for k, d in over if d == first), key=lambda k: q[p, k, first])
            assert (int(found.rollout[p]), int(found.step[p])) == (k, first + 1)
            assert torch.equal(found.tokens[p], tokens[p, k, first])
            assert int(found.passes[p]) == K * (first + 1)


def test_valid_stops_at_the_first_answer_that_keeps_the_rules(model, monkeypatch):
    """With rules that the answers of this model keep now and then."""
    tokens, _ = images_by_hand(model, BLANKED)

    def rules(inputs, answers):
        return answers.astype("int64").sum(-1) % 3 == 0

    fake = kind_of(model.config)
    object.__setattr__(fake, "rules", rules)
    monkeypatch.setattr(inference, "kind_of", lambda config: fake)
    found = model.predict(
        BLANKED, rollouts=K, depth=D, seed=SEED, select="valid", schedule="sequential"
    )
    for p in range(N):
        kept = [(k, d) for k in range(K) for d in range(D) if int(tokens[p, k, d].sum()) % 3 == 0]
        assert kept, "no answer of this puzzle is accepted: choose other weights"
        k, d = kept[0]
        assert (int(found.rollout[p]), int(found.step[p])) == (k, d + 1)
        assert torch.equal(found.tokens[p], tokens[p, k, d])
        assert int(found.passes[p]) == k * D + d + 1


def test_halting_ends_a_rollout_and_not_its_answer(model):
    tokens, q = images_by_hand(model, BLANKED)
    limit = threshold_of(q)
    found = model.predict(
        BLANKED, rollouts=K, depth=D, seed=SEED, halt="q", threshold=limit, entry="last"
    )
    for p in range(N):
        ends = []
        for k in range(K):
            over = [d for d in range(D) if q[p, k, d] > limit]
            ends.append(over[0] if over else D - 1)
        k = max(range(K), key=lambda k: q[p, k, ends[k]])
        assert (int(found.rollout[p]), int(found.step[p])) == (k, ends[k] + 1)
        assert torch.equal(found.tokens[p], tokens[p, k, ends[k]])
        assert int(found.passes[p]) == sum(end + 1 for end in ends)


def test_a_fixed_point_ends_a_rollout(model):
    found = by_hand(model, BLANKED, 12)
    tokens, _, logits = (t[:, 0] for t in stacked(found))
    moved = (logits[:, 1:] - logits[:, :-1]).norm(dim=-1).mean(-1)
    limit = float(moved[:, 1:8].amin(-1).median())
    answers = model.predict(
        BLANKED, depth=12, halt="fixed-point", tolerance=limit, select="last", seed=SEED
    )
    ends = []
    for p in range(N):
        still = [
            d
            for d in range(1, 12)
            if moved[p, d - 1] <= limit * (1 + 1e-6) and torch.equal(tokens[p, d], tokens[p, d - 1])
        ]
        ends.append(still[0] + 1 if still else 12)
    assert answers.step.tolist() == ends == answers.passes.tolist()
    assert len(set(ends)) > 1


ASKED = [
    {"reasoning": "restarts"},
    {"rollouts": K, "select": "mode"},
    {"rollouts": K, "noise": 0.5, "halt": "q"},
    {"rollouts": K, "init": "random", "select": "residual", "entry": "last"},
    {"rollouts": K, "noise": 0.2, "by": "symmetry", "select": "first-q"},
    {"halt": "fixed-point", "tolerance": 2.0, "select": "last"},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_neither_batches_nor_chunks_change_an_answer(model, asked, monkeypatch):
    settings = {**asked, "depth": D, "seed": SEED, "threshold": 0.5}
    want = model.predict(BLANKED, **settings)
    # PyTorch's products round otherwise at other sizes; those of the compiled library do not.
    near = 0 if {choice.implementation for choice in model.backend_report()} == {"cpp"} else 1e-5

    def assert_same(found, rows=slice(None)):
        for name in ("tokens", "step", "rollout", "passes"):
            assert torch.equal(getattr(found, name), getattr(want, name)[rows]), name
        torch.testing.assert_close(found.q, want.q[rows], rtol=near, atol=near)

    for size in (1, 2, 7):
        assert_same(model.predict(BLANKED, batch_size=size, **settings))
    part = torch.tensor([3, 1])
    assert_same(model.predict(BLANKED[part], numbers=part, **settings), part)
    monkeypatch.setattr(rollouts, "RECORD_BYTES", 1)
    assert_same(model.predict(BLANKED, **settings))
    if "reasoning" in asked or asked.get("rollouts", 1) > 1:
        other = model.predict(BLANKED, **{**settings, "seed": 1})
        assert not torch.equal(other.q, want.q), "the seed changes nothing"


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_as_on_gpus(model, asked, monkeypatch):
    """Padded sizes and tensors that stay in their place: a graph's conditions."""
    settings = {**asked, "depth": D, "seed": SEED, "threshold": 0.5}
    many = BLANKED.repeat(4, 1)
    want = model.predict(many, **settings)
    monkeypatch.setattr(inference_step, "Capture", InPlace)
    monkeypatch.setattr(inference_step, "_is_captured", lambda device: True)
    found = model.predict(many, **settings)
    for name in ("tokens", "step", "rollout", "passes"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    torch.testing.assert_close(found.q, want.q, rtol=1e-5, atol=1e-5)


def test_what_has_ended_costs_nothing(model, monkeypatch):
    """The rows of the network's calls are the passes that are reported; of rollouts that are begun
    ahead there are more."""
    monkeypatch.setattr(rollouts, "AHEAD", 0)
    rows = []
    real = InferenceStep.run

    def run(self):
        rows.append(self.size)
        return real(self)

    monkeypatch.setattr(InferenceStep, "run", run)
    asked = {"rollouts": K, "depth": D, "seed": SEED, "threshold": 0.5, "halt": "q"}
    for more in ({"schedule": "sequential", "select": "first-q"}, {}, {"batch_size": 3}):
        rows.clear()
        found = model.predict(BLANKED, **asked, **more)
        assert sum(rows) == int(found.passes.sum()) < N * K * D
        assert max(rows) <= more.get("batch_size", N * K)
    monkeypatch.setattr(rollouts, "AHEAD", 16)
    rows.clear()
    asked = {"reasoning": "restarts", "rollouts": 24, "depth": D, "threshold": 2.0}
    found = model.predict(BLANKED, **asked)
    assert int(found.passes.sum()) < sum(rows) < 2 * int(found.passes.sum())
    assert max(rows) <= 16
    rows.clear()
    assert list(model.watch(BLANKED[:1], **asked))[-1].answer.passes == sum(rows)


ROUNDS = [
    {"rollouts": 40, "batch_size": 8},  # all of a batch end at the same step
    {"reasoning": "restarts", "rollouts": 40, "threshold": 99.0, "halt": "never"},
    {"reasoning": "restarts", "rollouts": 13, "threshold": 0.5, "batch_size": 5},
    {"rollouts": 12, "halt": "q", "threshold": 0.5},
]


@pytest.mark.parametrize("asked", ROUNDS, ids=str)
@pytest.mark.parametrize("graphs", [False, True])
def test_no_more_steps_are_held_than_are_used(monkeypatch, asked, graphs):
    """On a GPU each is a graph, which takes long to capture: every size once, and kept."""
    model, made, alive = tiny_model(), [], [0, 0]
    if graphs:
        monkeypatch.setattr(inference_step, "Capture", InPlace)
        monkeypatch.setattr(inference_step, "_is_captured", lambda device: True)
        monkeypatch.setattr(rollouts, "AHEAD", 256)
    real = inference_step.borrowed

    @contextmanager
    def borrowed(*arguments):
        with real(*arguments) as step:
            alive[0] += 1
            alive[1] = max(alive)
            try:
                yield step
            finally:
                alive[0] -= 1

    init = InferenceStep.__init__
    monkeypatch.setattr(
        InferenceStep, "__init__", lambda self, m, n, g=True: made.append(n) or init(self, m, n, g)
    )
    monkeypatch.setattr("trm_fast.lanes.borrowed", borrowed)
    for puzzles in (1, N):
        model.predict(BLANKED[:puzzles], depth=D, **asked)
        assert alive[0] == 0 and alive[1] <= 2, "two, while one goes on from the other"
        if graphs:
            assert len(set(made)) == len(made), "a size was captured again"
            made.clear()
            model.predict(BLANKED[:puzzles], depth=D, **asked)
            assert made == []
            inference_step._free.clear()


def test_where_no_answer_is_better_the_first_of_a_rollout_stands(model, monkeypatch):
    """Every q -inf, as of weights that are not finite."""
    real = rollouts.Lanes.step
    tokens, _, _ = stacked(by_hand(model, BLANKED))

    def step(self):
        said = real(self)
        return replace(said, q=torch.full_like(said.q, -torch.inf))

    monkeypatch.setattr(rollouts.Lanes, "step", step)
    for select in ("q", "mode", "first-q"):
        found = model.predict(BLANKED, depth=D, rollouts=2, select=select)
        assert found.step.tolist() == [1] * N and found.rollout.tolist() == [0] * N
        given = with_given(model, BLANKED, tokens[:, 0, 0])
        assert torch.equal(found.tokens, given)


def test_the_same_answers_as_the_rule_without_early_exit(model):
    """Halting by q picks the answers that the whole record gives by the same rule."""
    whole = model.predict(BLANKED, depth=D, select="first-q", threshold=0.5, halt="never")
    _, q, _ = stacked(by_hand(model, BLANKED))
    q = q[:, 0]
    for p in range(N):
        over = [d for d in range(D) if q[p, d] > 0.5]
        want = over[0] if over else int(q[p].argmax())
        assert int(whole.step[p]) == want + 1


def test_a_budget_ends_it_with_what_is_there(model, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rollouts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    none = model.predict(BLANKED, budget=0.0)
    assert none.step.tolist() == none.passes.tolist() == [0] * N
    assert torch.equal(none.tokens, BLANKED.long())
    assert (none.q == -torch.inf).all() and (none.confidence == 0).all() and none.cut.all()
    real = rollouts.Lanes.step

    def step(self):
        now[0] += 1.0
        return real(self)

    monkeypatch.setattr(rollouts.Lanes, "step", step)
    found = model.predict(BLANKED, depth=D, rollouts=2, budget=3.5, batch_size=N)
    assert found.passes.tolist() == [4] * N and found.cut.all()
    want = model.predict(BLANKED, depth=4)
    assert not want.cut.any()
    restarts = {"reasoning": "restarts", "depth": 2, "rollouts": 3, "threshold": 99.0}
    some = model.predict(BLANKED, **restarts, batch_size=1, budget=25.5)
    assert some.passes.tolist() == [6, 6, 6, 4, 4], "by turns"
    assert some.cut.tolist() == [False] * 3 + [True] * 2
    assert torch.equal(found.tokens, want.tokens)
    seen = []
    for frame in model.watch(BLANKED[:1], depth=D, rollouts=2, budget=3.5):
        seen.append(frame.steps.tolist())
        now[0] += 100.0  # looking costs nothing
    assert seen == [[step] * 2 for step in range(1, 5)]


def test_a_record_holds_two_answers_of_a_rollout_however_deep_it_is(model):
    """What memory a plan takes: its answers are not kept step by step."""
    kind = kind_of(model.config)
    for select in ("q", "valid"):
        plan = inference.plan_for(model, rollouts=K, depth=D, select=select)
        run = Rollouts(model, kind, Puzzles(BLANKED, torch.zeros(N), torch.arange(N)), plan, 7)
        for _ in run.run():
            pass
        result = run.result()
        held = [result.best, result.last, *vars(result.record).values()]
        if select == "valid":
            held.append(result.valid)
        whole = rollouts.record_bytes(K, D, 16, 6)
        assert whole == K * (D * 17 + 2 * 16)
        steps = 8 - (0 if select == "valid" else D)  # [K] of 8 bytes; flags are not always there
        assert sum(t.nbytes for t in held) == N * (whole + K * steps)
        assert rollouts.puzzles_at_once(plan, 16, 6) == rollouts.RECORD_BYTES // whole
    deep = inference.plan_for(model, rollouts=4096, depth=32768)
    assert rollouts.puzzles_at_once(deep, 16, 6) == 1


def test_different_answers_have_different_numbers():
    """Also where one cell differs, and where two are exchanged."""
    weights = rollouts._fingerprint_weights(900)
    generator = torch.Generator().manual_seed(5)
    one = torch.randint(0, 12, (900,), generator=generator)
    others = one.repeat(900, 1)
    others[torch.arange(900), torch.arange(900)] += 1
    swapped = one.repeat(899, 1)
    for row in range(899):
        swapped[row, [row, row + 1]] = swapped[row, [row + 1, row]]
    whole = torch.cat([one[None], others, swapped])
    numbers = (whole * weights).sum(-1)
    assert numbers.unique().numel() == whole.unique(dim=0).shape[0]


def test_frames_show_every_step(model):
    asked = {"rollouts": K, "depth": D, "seed": SEED}
    frames = list(model.watch(BLANKED[:1], **asked))
    tokens, q = images_by_hand(model, BLANKED)
    assert [frame.number for frame in frames] == list(range(1, D + 1))
    for number, frame in enumerate(frames):
        assert torch.equal(frame.tokens, tokens[0, :, number])
        torch.testing.assert_close(frame.q, q[0, :, number], rtol=1e-5, atol=1e-5)
        assert frame.steps.tolist() == [number + 1] * K
        assert frame.running.tolist() == [number + 1 < D] * K
        given = with_given(model, BLANKED[:1], torch.zeros(1, 16))[0] > 0
        assert (frame.certainty[:, given] == 1).all()
        assert (frame.certainty > 0).all() and (frame.certainty <= 1).all()
        assert (frame.answer is not None) == (number + 1 == D)
    want = model.predict(BLANKED[:1], **asked)
    for name, value in vars(frames[-1].answer).items():
        assert torch.equal(value, getattr(want, name))


def test_frames_of_restarts_follow_each_other(model):
    asked = {"reasoning": "restarts", "rollouts": 3, "depth": 2, "seed": SEED, "threshold": 99.0}
    frames = list(model.watch(BLANKED[:1], **asked))
    assert [frame.steps.tolist() for frame in frames] == [
        [1, 0, 0], [2, 0, 0], [2, 1, 0], [2, 2, 0], [2, 2, 1], [2, 2, 2],
    ]  # fmt: skip
    assert torch.equal(frames[0].tokens[1], BLANKED[0].long()), "not begun: the puzzle itself"
    assert frames[0].q[1] == -torch.inf
    nothing = list(model.watch(BLANKED[:1], budget=0.0))
    assert len(nothing) == 1 and nothing[0].answer.step.tolist() == [0]
    with pytest.raises(ValueError, match="one puzzle is watched at a time, got 2"):
        model.watch(BLANKED[:2])


def test_whoever_stops_looking_stops_the_work(monkeypatch):
    model = tiny_model().train()
    ran = []
    real = rollouts.Lanes.step
    monkeypatch.setattr(rollouts.Lanes, "step", lambda self: ran.append(1) or real(self))
    frames = model.watch(BLANKED[:1], depth=50)
    next(frames)
    frames.close()
    assert len(ran) <= 2 and model.training


def test_the_default_is_the_models_own_depth_and_highest_q(model):
    found = model.predict(BLANKED)
    _, q, _ = stacked(by_hand(model, BLANKED, DEPTH))
    assert found.passes.tolist() == [DEPTH] * N
    assert torch.equal(found.step, q[:, 0].argmax(-1) + 1)
    model.q_threshold = -99.0
    try:
        first = model.predict(BLANKED, select="first-q")
        assert first.step.tolist() == [1] * N, "the threshold is the model's own"
        assert model.predict(BLANKED, select="first-q", threshold=99.0).passes.tolist() == [3] * N
    finally:
        model.q_threshold = None


@pytest.mark.parametrize("arch", ["trm_singlez", "trm_hier6", "hrm", "transformers_baseline"])
def test_other_networks_have_states_too(arch):
    more = {} if arch in ("trm_singlez", "trm_hier6") else {"H_layers": 1}
    model = tiny_model(name=arch, **more)
    for asked in ({"noise": 0.5, "noise_on": "both"}, {"init": "random"}):
        found = model.predict(BLANKED, rollouts=3, **asked, seed=SEED)
        again = model.predict(BLANKED, rollouts=3, **asked, seed=SEED, batch_size=4)
        assert torch.equal(found.tokens, again.tokens)
        other = model.predict(BLANKED, rollouts=3, **asked, seed=2)
        assert not torch.equal(found.q, other.q)


def test_rounding_in_bfloat16_leaves_the_procedure():
    model = tiny_model(forward_dtype="bfloat16")
    found = model.predict(BLANKED, reasoning="ptrm", rollouts=K, depth=3, noise=0.5, seed=SEED)
    _, q, _ = stacked(by_hand(model, BLANKED, 3, noise=0.5))
    torch.testing.assert_close(found.q, q[:, :, -1].amax(-1), rtol=1e-2, atol=1e-2)
