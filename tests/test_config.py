"""config, with its parts options, presets and names: every key, check and raise."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from config_errors import message

from trm_fast import names
from trm_fast.config import (
    BEYOND_OFFICIAL,
    PRESETS,
    ArchConfig,
    ConfigError,
    EvaluatorConfig,
    TrainConfig,
    canonical_key,
    did_you_mean,
    flatten,
    from_preset,
    layer,
    option_fields,
)
from trm_fast.options import convert, option, show


def test_evaluator_config():
    arc = EvaluatorConfig.from_value({"name": "arc@ARC", "submission_K": 2})
    assert arc == EvaluatorConfig("arc@ARC", (("submission_K", 2),))
    assert arc.to_dict() == {"name": "arc@ARC", "submission_K": 2}
    assert EvaluatorConfig.from_value("arc@ARC") == EvaluatorConfig("arc@ARC")
    assert EvaluatorConfig.from_value(arc) is arc
    for bad in (
        3,
        None,
        {},
        {"name": ""},
        {"name": 3},
        {"name": "a", "k": {"x": 1}},
        {"name": "a", "k": [[1]]},
        {"name": "a", 1: 2},
    ):
        assert message(EvaluatorConfig.from_value, bad).startswith("evaluators must be a list of")
    assert TrainConfig(evaluators=["a", {"name": "b"}]).evaluators == (
        EvaluatorConfig("a"),
        EvaluatorConfig("b"),
    )
    listed = EvaluatorConfig.from_value({"name": "a", "k": [1, 2]})
    assert listed.options == (("k", (1, 2)),) and listed.to_dict() == {"name": "a", "k": [1, 2]}
    assert "evaluators must be" in message(TrainConfig, evaluators=3)


def test_train_config_defaults_are_cfg_pretrain_and_ours_change_nothing():
    config = TrainConfig()
    official = config.official_dict()
    assert official.pop("arch") == {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "halt_exploration_prob": 0.1,
        "halt_max_steps": 16,
        "H_cycles": 3,
        "L_cycles": 6,
        "H_layers": 0,
        "L_layers": 2,
        "hidden_size": 512,
        "num_heads": 8,
        "expansion": 4,
        "puzzle_emb_ndim": 512,
        "pos_encodings": "rope",
        "forward_dtype": "bfloat16",
        "mlp_t": False,
        "puzzle_emb_len": 16,
        "no_ACT_continue": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    assert official == {
        "data_paths": ["data/arc-aug-1000"],
        "data_paths_test": [],
        "evaluators": [{"name": "arc@ARC"}],
        "global_batch_size": 768,
        "epochs": 100000,
        "eval_interval": 10000,
        "checkpoint_every_eval": True,
        "lr": 1e-4,
        "lr_min_ratio": 1.0,
        "lr_warmup_steps": 2000,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.1,
        "puzzle_emb_weight_decay": 0.1,
        "puzzle_emb_lr": 1e-2,
        "seed": 0,
        "min_eval_interval": 0,
        "ema": False,
        "ema_rate": 0.999,
        "freeze_weights": False,
        "project_name": None,
        "run_name": None,
        "load_checkpoint": None,
        "checkpoint_path": None,
        "eval_save_outputs": [],
    }
    ours = {key: getattr(config, key) for key in BEYOND_OFFICIAL.split() if "." not in key}
    assert ours == {
        "preset": None,
        "generate": 0,
        "generate_puzzle": "sudoku",
        "augment": "none",
        "curriculum": 0.0,
        "depth_stages": (),
        "grad_accum": 1,
        "steps": None,
        "seeds": 1,
        "max_skipped": 5,
        "optimizer": "adam_atan2",
        "muon_lr": 0.02,
        "weight_decay_on": "all",
        "grad_clip": 0.0,
        "step_loss_decay": 1.0,
        "constraint_weight": 0.0,
        "constraint_boxes": True,
        "ema_warmup": False,
        "eval_steps": None,
        "eval_max_puzzles": None,
        "eval_batch_size": None,
        "eval_steps_max": None,
        "load_identifiers": None,
        "resume": "auto",
        "save_interval": None,
        "keep": None,
        "official": False,
        "log_interval": 1,
        "logger": (),
        "device": "auto",
        "threads": None,
        "compile": False,
        "profile": False,
        "cuda_graph": True,
    }
    assert {*official, *ours, "arch"} == {f.name for f in dataclasses.fields(TrainConfig)}


# Per key: some good values and what they become, and bad values with the start of the message.
COUNT = ([(1, 1), ("7", 7)], [(0, "an integer >= 1"), (None, "an integer >= 1"), (True, "an int")])
COUNT_OR_NULL = ([(1, 1), (None, None)], [(0, "an integer >= 1 or null"), ("x", "an integer >= 1")])
NATURAL = ([(0, 0), (5.0, 5)], [(-1, "an integer >= 0"), (0.5, "an integer >= 0")])
RATE = ([(0, 0.0), ("1e-4", 1e-4)], [(-0.1, "a number >= 0"), ("x", "a number"), (None, "a num")])
SHARE = ([(0, 0.0), (1, 1.0)], [(1.01, "a number in [0, 1]"), (-0.1, "a number in [0, 1]")])
BELOW_1 = ([(0, 0.0), (0.99, 0.99)], [(1, "a number in [0, 1)")])
SWITCH = ([("True", True), (0, False)], [(2, "true or false"), (None, "true or false")])
TEXT_OR_NULL = ([("x", "x"), (None, None)], [("", "text or null"), (3, "text or null")])
TEXTS = (
    [(["a", "b"], ("a", "b")), ("a", ("a",))],
    [([3], "a list of texts"), (3, "a list"), ([""], "a list")],
)
NAME_OR_NULL = (
    [("x.y", "x.y"), (None, None)],
    [(3, "text or null")]
    + [(bad, "a folder name, got") for bad in ("../x", "a/b", "a\\b", "..", ".")],
)
CASES = {
    "data_paths": TEXTS,
    "data_paths_test": TEXTS,
    "eval_save_outputs": (
        [(["preds", "labels"], ("preds", "labels")), ([], ())],
        [(["pred"], "a list of inputs, labels"), (3, "a list of inputs, labels")],
    ),
    "generate_puzzle": ([("maze", "maze")], [("arc", "one of sudoku, maze")]),
    "generate": ([(0, 0)], [(-1, "an integer >= 0"), (True, "an integer >= 0")]),
    "augment": (
        [("sudoku", "sudoku"), ("dihedral", "dihedral"), ("none", "none")],
        [("maze", "one of none, sudoku, dihedral")],
    ),
    "curriculum": SHARE,
    "depth_stages": (
        [(["0.3:1x2", "0.6:2x4"], ("0.3:1x2", "0.6:2x4")), (".5 : 3x6", (".5 : 3x6",)), ([], ())],
        [(3, "a list of texts"), (["0.3"], "texts like 0.3:1x2, got '0.3'")],
    ),
    "global_batch_size": COUNT,
    "grad_accum": ([(2, 2)], COUNT[1]),
    "epochs": ([(20000, 20000)], COUNT[1]),
    "steps": COUNT_OR_NULL,
    "seed": NATURAL,
    "seeds": COUNT,
    "max_skipped": COUNT,
    "optimizer": (
        [("muon", "muon")],
        [("adam", "one of adam_atan2, adamw, muon, got 'adam' (did")],
    ),
    "lr": RATE,
    "lr_min_ratio": SHARE,
    "lr_warmup_steps": NATURAL,
    "weight_decay": RATE,
    "beta1": BELOW_1,
    "beta2": BELOW_1,
    "muon_lr": RATE,
    "weight_decay_on": ([("all", "all")], [("norms", "one of all, matrices, got 'norms'")]),
    "grad_clip": RATE,
    "step_loss_decay": (
        [("0.7", 0.7), (1, 1.0)],
        [(0, "a number in (0, 1]"), (1.1, "a number in")],
    ),
    "constraint_weight": RATE,
    "constraint_boxes": SWITCH,
    "puzzle_emb_lr": RATE,
    "puzzle_emb_weight_decay": RATE,
    "freeze_weights": SWITCH,
    "ema": SWITCH,
    "ema_rate": SHARE,
    "ema_warmup": SWITCH,
    "eval_interval": COUNT_OR_NULL,
    "eval_steps": COUNT_OR_NULL,
    "min_eval_interval": ([(0, 0), (None, None)], [(-1, "an integer >= 0 or null")]),
    "eval_max_puzzles": COUNT_OR_NULL,
    "eval_batch_size": COUNT_OR_NULL,
    "eval_steps_max": COUNT_OR_NULL,
    "project_name": NAME_OR_NULL,
    "run_name": NAME_OR_NULL,
    "checkpoint_path": TEXT_OR_NULL,
    "load_checkpoint": TEXT_OR_NULL,
    "load_identifiers": (
        [(None, None)],
        [("auto", "given with load_checkpoint"), (3, "text")],
    ),
    "resume": ([("auto", "auto"), ("a/step_3", "a/step_3")], [("", "text"), (None, "text")]),
    "checkpoint_every_eval": SWITCH,
    "save_interval": COUNT_OR_NULL,
    "keep": COUNT_OR_NULL,
    "official": SWITCH,
    "log_interval": COUNT,
    "logger": (
        [(["wandb", "trackio"], ("wandb", "trackio")), ("tensorboard", ("tensorboard",)), ([], ())],
        [
            (
                ["wandbb"],
                "a list of wandb, trackio, tensorboard, got ['wandbb'] (did you mean 'wandb'",
            )
        ],
    ),
    "device": (
        [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("mps", "mps"), ("auto", "auto")],
        [("gpu", "one of auto, cpu, cuda, cuda:N, mps"), ("cuda:x", "one of auto"), (0, "text")],
    ),
    "threads": (
        [(1, 1), (None, None)],
        [(n, "an integer in [1, 1024] or null") for n in (0, 1025)],
    ),
    "compile": SWITCH,
    "profile": SWITCH,
    "cuda_graph": SWITCH,
    "preset": ([("arc1", "arc1"), (None, None)], [("arc3", "one of sudoku-mini, sudoku-extreme")]),
}


def test_the_cases_cover_every_key():
    flat = {key for key in option_fields() if not key.startswith("arch.")}
    assert set(CASES) | {"evaluators"} == flat


@pytest.mark.parametrize("key", CASES)
def test_train_config_key(key):
    good, bad = CASES[key]
    for given, expected in good:
        result = getattr(TrainConfig(**{key: given}), key)
        assert result == expected and type(result) is type(expected)
    for given, wanted in bad:
        assert message(TrainConfig, **{key: given}).startswith(f"{key} must be {wanted}")


def test_train_config_checks_keys_together():
    assert "exclude each other" in message(TrainConfig, generate=5)
    assert "at least one directory" in message(TrainConfig, data_paths=[])
    assert TrainConfig(data_paths=[], generate=5).generate == 5
    assert "multiple of grad_accum, got 768 and 5" in message(TrainConfig, grad_accum=5)
    assert "epochs must be a multiple of eval_interval, got 15 and 10" in message(
        TrainConfig, epochs=15, eval_interval=10
    )
    assert TrainConfig(epochs=15, eval_interval=None).epochs == 15
    assert TrainConfig(epochs=15, eval_interval=10, steps=3).steps == 3
    assert "needs arch.puzzle_emb_ndim > 0" in message(
        TrainConfig, freeze_weights=True, arch=ArchConfig(puzzle_emb_ndim=0)
    )
    assert TrainConfig(freeze_weights=True).freeze_weights
    assert "arch must be an ArchConfig" in message(TrainConfig, arch={"H_cycles": 3})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_pickle(name):
    config = from_preset(name)
    assert config.preset == name
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config and hash(config) == hash(from_preset(name))
    flat = flatten(config.to_dict())
    for key, value in PRESETS[name].items():
        assert flat[key] == value, key


def test_sudoku_mini_is_the_recipe():
    config = from_preset()
    arch = config.arch.model_config(
        batch_size=64, seq_len=81, vocab_size=11, num_puzzle_identifiers=1
    )
    assert config.preset == "sudoku-mini"
    assert (arch.total_len, arch.hidden_size, arch.token_width, arch.channel_width) == (
        81,
        48,
        96,
        96,
    )
    assert (arch.L_layers, arch.H_cycles, arch.L_cycles, arch.halt_max_steps) == (1, 1, 2, 8)
    assert (arch.mlp_t, arch.pos_encodings, arch.forward_dtype) == (True, "none", "float32")
    assert (arch.q_readout, arch.q_logits, arch.puzzle_emb_ndim) == ("mean", 1, 0)
    assert config.arch.loss_type == "stablemax_cross_entropy"
    assert arch.halt_exploration_prob == 0.5
    assert (config.global_batch_size, config.steps, config.optimizer) == (64, 1500, "adamw")
    assert (config.lr, config.lr_warmup_steps, config.lr_min_ratio) == (0.02, 50, 0.1)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.ema, config.ema_rate, config.ema_warmup) == (True, 0.99, True)
    assert (config.grad_clip, config.curriculum, config.augment) == (1.0, 0.2, "sudoku")
    assert config.generate > 0 and config.data_paths == ()
    assert message(from_preset, "sudoku_mini").endswith("(did you mean 'sudoku-mini'?)")


def test_replace_and_layer():
    mini = from_preset()
    other = mini.replace({"seed": 1, "arch.L_cycles": 3, "arch": {"H-cycles": 2}})
    assert (other.seed, other.arch.L_cycles, other.arch.H_cycles) == (1, 3, 2)
    assert dataclasses.replace(other, seed=0, arch=mini.arch) == mini
    assert mini.replace({"epochs": 5}).steps is None
    assert mini.replace({"epochs": 5, "steps": 6}).steps == 6
    assert mini.replace({"eval_interval": 5}).eval_steps is None
    assert mini.replace({"data_path": ["a"]}).generate == 0
    assert TrainConfig().replace({"generate": 9}).data_paths == ()
    assert TrainConfig().replace({"generate": 0}).data_paths == ("data/arc-aug-1000",)
    assert "exclude each other" in message(mini.replace, {"data_paths": ["a"], "generate": 3})
    assert "preset cannot be replaced" in message(mini.replace, {"preset": "arc1"})
    assert layer({"steps": 3}, {"data_paths": []}) == {"steps": 3, "data_paths": []}


def test_keys():
    assert canonical_key("arch") == "arch.name" and canonical_key("data-path") == "data_paths"
    assert canonical_key("arch.loss.loss_type") == "arch.loss_type"
    assert canonical_key("arch.causal") is None
    assert message(canonical_key, "mlp_t") == "unknown key 'mlp_t' (did you mean 'arch.mlp_t'?)"
    assert "did you mean 'eval_interval'" in message(canonical_key, "eval_intervall")
    assert message(canonical_key, "zzz") == "unknown key 'zzz'"
    assert message(canonical_key, 3) == "unknown key 3: a key is text"
    assert flatten({"arch": {"loss": {"name": "losses@ACTLossHead"}, "causal": False}}) == {}
    assert flatten({"arch.puzzle_emb_ndim": "${.hidden_size}"}) == {"arch.puzzle_emb_ndim": None}
    assert "arch.loss.name must be losses@ACTLossHead" in message(
        flatten, {"arch": {"loss": {"name": "losses@Other"}}}
    )
    assert "unknown key 'arch.3'" in message(TrainConfig.from_dict, {"arch": {3: 4}})
    assert did_you_mean("x" * 10000, ["xxx"]) == ""


def test_total_steps_is_the_official_estimate():
    config = TrainConfig(epochs=50000, eval_interval=5000)
    assert config.total_steps(1000, 1.0) == 65104  # Sudoku-Extreme
    assert config.total_steps(1000, 0.5) == 32552
    assert config.replace({"steps": 7}).total_steps(1000, 1.0) == 7
    few = TrainConfig(epochs=1, eval_interval=None)
    assert "epochs=1 gives no full batch of 768" in message(few.total_steps, 10, 1.0)


def test_with_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data_paths=["data/sudoku-extreme-1k-aug-1000/"]).with_names(0)
    assert config.project_name == "Sudoku-extreme-1k-aug-1000-ACT-torch"
    assert config.run_name == "trm-amber-alder"
    assert config.checkpoint_path == f"checkpoints/{config.project_name}/trm-amber-alder"
    mini = from_preset().with_names(65)
    assert (mini.project_name, mini.run_name) == ("Sudoku-mini", "sudoku-mini-ample-aspen")
    given = TrainConfig(run_name="r", project_name="p").with_names()
    assert given.checkpoint_path == "checkpoints/p/r"
    assert TrainConfig(checkpoint_path="x").with_names(3).checkpoint_path == "x"
    # A drawn name is drawn again while its folder exists.
    (tmp_path / "checkpoints/Sudoku-mini/sudoku-mini-amber-alder").mkdir(parents=True)
    draws = iter([0, 0, 1])
    monkeypatch.setattr("trm_fast.config.secrets.randbelow", lambda n: next(draws))
    assert from_preset().with_names().run_name == "sudoku-mini-amber-aspen"


def test_slugs_differ():
    count = len(names.ADJECTIVES) * len(names.NOUNS)
    assert (len(names.ADJECTIVES), len(names.NOUNS)) == (64, 64)
    assert len({names.slug(n) for n in range(count)}) == count == 4096
    assert names.slug(count) == names.slug(0)


def test_every_key_has_help():
    for key, field in option_fields().items():
        assert 8 < len(field.metadata["help"]) < 90, key


def test_helpers():
    assert show(10**5000) == "a huge number"
    assert len(show("x" * 999)) == 60 and show("a\nb") == "'a\\nb'"
    fields = dataclasses.make_dataclass("T", [("n", "int", option("h", 1, low=0, open="("))])
    assert convert("n", dataclasses.fields(fields)[0], "2") == 2
    assert str(ConfigError("a\n  b")) == "a b" and issubclass(ConfigError, ValueError)


def test_config_needs_only_the_standard_library():
    code = (
        "import sys; import trm_fast.overrides; "
        "assert not {'torch', 'numpy', 'yaml', 'triton'} & set(sys.modules), sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
