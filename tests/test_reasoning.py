"""How a model is asked: what is allowed, what presets say, what depends on the model."""

from dataclasses import asdict

import pytest
from answering import tiny_config

from trm_fast.puzzle_kind import kind_of
from trm_fast.reasoning import PRESETS, THRESHOLD, Reasoning, noisy_states, reasoning_of

SUDOKU = tiny_config()
MAZE = tiny_config(seq_len=25, vocab_size=6)
OTHER = tiny_config(seq_len=9, vocab_size=7)


def resolved(config=SUDOKU, fitted=None, **settings):
    return Reasoning(**settings).resolved(config, kind_of(config), fitted)


def test_the_usual_is_one_rollout_of_the_models_own_depth():
    plan = resolved()
    assert asdict(plan) == {
        "depth": 3,
        "rollouts": 1,
        "by": "symmetry",
        "noise": 0.0,
        "noise_on": "z_L",
        "init": "fixed",
        "entry": "best-q",
        "select": "q",
        "halt": "never",
        "schedule": "parallel",
        "threshold": THRESHOLD,
        "tolerance": 0.01,
        "seed": 0,
        "budget": None,
    }


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"rollouts": 4}, {"by": "symmetry", "init": "fixed"}),
        ({"rollouts": 4, "noise": 0.1}, {"by": "noise"}),
        ({"rollouts": 4, "noise": 0.1, "by": "symmetry"}, {"by": "symmetry", "noise": 0.1}),
        ({"rollouts": 4, "init": "random"}, {"by": "init", "init": "random"}),
        ({"rollouts": 4, "by": "init"}, {"by": "init", "init": "random"}),
        ({"depth": 64}, {"depth": 64}),
        ({"threshold": 2.5}, {"threshold": 2.5}),
    ],
)
def test_what_is_not_said_follows(settings, want):
    plan = asdict(resolved(fitted=7.0, **settings))
    assert {name: plan[name] for name in want} == want
    assert plan["threshold"] == settings.get("threshold", 7.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"select": "best"}, "select must be one of last, q, mode, residual, first-q, valid, got"),
        ({"halt": "now"}, "halt must be one of never, q, fixed-point, got 'now'"),
        ({"by": "luck"}, "by must be one of symmetry, noise, init, got 'luck'"),
        ({"noise_on": "y"}, "noise_on must be one of z_L, z_H, both, got 'y'"),
        ({"init": None}, "init must be one of fixed, random, got None"),
        ({"rollouts": 0}, "rollouts must be a whole number from 1 to 65535, got 0"),
        ({"rollouts": 65536}, "rollouts must be a whole number from 1 to 65535, got 65536"),
        ({"rollouts": True}, "rollouts must be a whole number from 1 to 65535, got True"),
        ({"depth": 1.5}, "depth must be a whole number from 1 to 65535, got 1.5"),
        ({"seed": -1}, "seed must be a whole number from 0 to 18446744073709551615, got -1"),
        ({"noise": -0.1}, "noise must be a number of at least 0, got -0.1"),
        ({"noise": float("nan")}, "noise must be a number of at least 0, got nan"),
        ({"noise": None}, "noise must be a number of at least 0, got None"),
        ({"budget": -1}, "budget must be a number of at least 0, got -1"),
        ({"tolerance": "x"}, "tolerance must be a number of at least 0, got 'x'"),
        ({"threshold": float("inf")}, "threshold must be a number, got inf"),
        ({"by": "noise"}, "by='noise' needs noise: noise must be above 0, got 0"),
        ({"select": "first"}, r"valid, got 'first' \(did you mean 'first-q'\?\)$"),
        ({"schedule": "sequential"}, "select must be first-q or valid, got 'q'"),
    ],
)
def test_what_is_refused(settings, said):
    with pytest.raises(ValueError, match=said) as caught:
        Reasoning(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (OTHER, {"rollouts": 2}, "no symmetry is known of .*: by must be noise or init"),
        (OTHER, {"select": "valid"}, "select='valid' is for Sudoku and mazes"),
        (
            MAZE,
            {"rollouts": 9},
            "a maze has 8 symmetries: rollouts must be at most 8, or",
        ),
        (
            tiny_config(name="transformers_baseline", H_layers=1),
            {"noise": 1.0},
            "noise_on='z_L': the network transformers_baseline has z_H",
        ),
    ],
)
def test_what_a_model_has_not(config, settings, said):
    with pytest.raises(ValueError, match=said):
        resolved(config, **settings)


def test_what_a_model_has():
    assert resolved(OTHER, rollouts=9, noise=0.1).by == "noise"
    assert resolved(MAZE, rollouts=9, by="symmetry", noise=0.1).rollouts == 9
    assert noisy_states(SUDOKU, "both") == ["z_H", "z_L"]
    six = tiny_config(name="trm_hier6")
    assert noisy_states(six, "z_L") == [f"z_L{n}" for n in range(1, 7)]
    assert noisy_states(six, "z_H") == ["z_H"]


def test_presets_are_as_published():
    """Of PTRM's and EqR's papers: copies, steps, noise, what counts."""
    sudoku, maze, other = (kind_of(config) for config in (SUDOKU, MAZE, OTHER))
    ptrm = [reasoning_of("ptrm", kind, {}) for kind in (sudoku, maze, other)]
    assert [(p.rollouts, p.depth, p.noise) for p in ptrm] == [
        (100, 64, 0.3), (100, 16, 1.0), (25, 16, 0.2),
    ]  # fmt: skip
    assert [p.select for p in ptrm] == ["q", "mode", "q"]
    assert {(p.entry, p.noise_on, p.init) for p in ptrm} == {("last", "z_L", "fixed")}
    eqr = reasoning_of("eqr", sudoku, {})
    assert (eqr.rollouts, eqr.depth, eqr.init, eqr.select) == (128, 64, "random", "residual")
    restarts = reasoning_of("restarts", sudoku, {"rollouts": 4, "threshold": 1.0})
    assert (restarts.by, restarts.schedule, restarts.select) == (
        "symmetry",
        "sequential",
        "first-q",
    )
    assert (restarts.rollouts, restarts.threshold, restarts.depth) == (4, 1.0, None)
    assert reasoning_of("vote", maze, {}).rollouts == 8
    for name in PRESETS:
        for config in (SUDOKU, MAZE, OTHER):
            if kind_of(config).name in PRESETS[name]:
                reasoning_of(name, kind_of(config), {}).resolved(config, kind_of(config), None)


def test_no_such_preset_or_setting():
    kind = kind_of(OTHER)
    with pytest.raises(ValueError, match="preset must be one of restarts, vote, ptrm, eqr, got"):
        reasoning_of("best", kind, {})
    with pytest.raises(ValueError, match=r"eqr, got 'votes' \(did you mean 'vote'\?\)$"):
        reasoning_of("votes", kind, {})
    with pytest.raises(ValueError, match="preset='vote' needs symmetries, none is known"):
        reasoning_of("vote", kind, {})
    with pytest.raises(ValueError, match=r"no setting 'rollout' .*did you mean 'rollouts'\?"):
        reasoning_of(None, kind, {"rollout": 3})
