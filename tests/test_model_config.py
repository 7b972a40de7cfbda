"""model_config: the model's keys, their checks and every raise."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from config_errors import message

from trm_fast.config import ArchConfig, ModelConfig

# What the official trainer hands to the official model class for Sudoku with arch.mlp_t=True.
OFFICIAL = {
    "batch_size": 768,
    "seq_len": 81,
    "num_puzzle_identifiers": 1,
    "vocab_size": 11,
    "H_cycles": 3,
    "L_cycles": 6,
    "H_layers": 0,
    "L_layers": 2,
    "hidden_size": 512,
    "expansion": 4,
    "num_heads": 8,
    "pos_encodings": "none",
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.1,
    "puzzle_emb_ndim": 512,
    "forward_dtype": "bfloat16",
    "mlp_t": True,
    "puzzle_emb_len": 16,
    "no_ACT_continue": True,
    "causal": False,
}


def model(**values: Any) -> ModelConfig:
    return ModelConfig.from_dict({**OFFICIAL, **values})


def test_model_config_takes_the_official_dictionary():
    config = model(name="trm", loss={"name": "y"})
    assert config.prefix_len == 16 and config.total_len == 97 and config.head_dim == 64
    # The shapes that the official code gives for these settings (landscape: gate_up 1024 x 97).
    assert config.token_width == 512 and config.channel_width == 1536
    assert isinstance(config.expansion, float) and config.expansion == 4.0
    assert config.rms_norm_eps == 1e-5 and config.rope_theta == 10000.0
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_model_config_defaults_are_official_and_ours_are_off():
    needed = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
    config = ModelConfig.from_dict({k: v for k, v in OFFICIAL.items() if k in needed})
    assert {k: getattr(config, k) for k in config.to_dict() if k not in needed} == {
        "puzzle_emb_ndim": 0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "forward_dtype": "bfloat16",
        "mlp_t": False,
        "puzzle_emb_len": 16,
        "no_ACT_continue": True,
        "H_layers": 0,
        "act_enabled": True,
        "act_inference": False,
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "intermediate_size": None,
        "token_intermediate_size": None,
        "intermediate_multiple": 256,
        "q_readout": "first",
        "q_logits": 2,
        "semantics": "head",
        "vector_gates": False,
        "cell_attention": False,
        "dropout": 0.0,
        "damping": 1.0,
        "noise": 0.0,
        "random_init": False,
        "latents": 1,
        "backend": "auto",
        "policy": "auto",
        "quantize": "none",
    }
    assert config.prefix_len == 16  # puzzle_emb_ndim=0 with puzzle_emb_len=16 is allowed here
    for key in needed:
        assert f"the model needs the keys {key}" == message(
            ModelConfig.from_dict, {k: v for k, v in OFFICIAL.items() if k != key}
        )


@pytest.mark.parametrize(
    ("values", "prefix", "token", "channel"),
    [
        ({"puzzle_emb_len": 0}, 1, 256, 1536),
        ({"puzzle_emb_len": 0, "puzzle_emb_ndim": 513}, 2, 256, 1536),
        ({"puzzle_emb_len": 0, "puzzle_emb_ndim": 0}, 0, 256, 1536),
        ({"intermediate_multiple": 8}, 16, 264, 1368),
        ({"intermediate_size": 96, "token_intermediate_size": 80}, 16, 80, 96),
        ({"hidden_size": 48, "puzzle_emb_ndim": 0, "expansion": 0.001}, 16, 256, 256),
    ],
)
def test_model_config_derived_sizes(values, prefix, token, channel):
    config = model(**values)
    assert (config.prefix_len, config.token_width, config.channel_width) == (prefix, token, channel)
    assert config.total_len == prefix + 81


def test_model_config_is_lenient_like_pydantic():
    config = model(H_cycles="3", L_cycles=6.0, L_layers=" 2.0 ", expansion="4", mlp_t="True")
    assert (config.H_cycles, config.L_cycles, config.L_layers) == (3, 6, 2)
    assert config.expansion == 4.0 and config.mlp_t is True
    assert type(config.H_cycles) is int and type(config.L_cycles) is int
    assert model(mlp_t=1).mlp_t is True and model(mlp_t="off").mlp_t is False
    assert model(rms_norm_eps="1e-6").rms_norm_eps == 1e-6
    assert model(pos_encodings=None).pos_encodings == "none"


INTS = ["batch_size", "seq_len", "num_puzzle_identifiers", "vocab_size", "H_cycles", "L_cycles"]
INTS += ["L_layers", "hidden_size", "num_heads", "halt_max_steps", "intermediate_multiple"]
INTS += ["intermediate_size", "token_intermediate_size", "latents"]


@pytest.mark.parametrize("key", INTS)
@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "a", "1.5", "", [1], float("nan"), 2**63, 1e300])
def test_model_config_refuses_bad_integers(key, bad):
    wanted = f"{key} must be an integer >= 1"
    assert message(model, **{key: bad}).startswith(wanted)


@pytest.mark.parametrize("key", ["puzzle_emb_ndim", "puzzle_emb_len"])
def test_model_config_counts_may_be_zero_not_negative(key):
    assert getattr(model(puzzle_emb_ndim=0, **({key: 0} if "len" in key else {})), key) == 0
    assert message(model, **{key: -1}) == f"{key} must be an integer >= 0, got -1"


@pytest.mark.parametrize(
    ("key", "bad", "wanted"),
    [
        ("expansion", 0, "expansion must be a number > 0, got 0"),
        ("expansion", True, "expansion must be a number > 0, got True"),
        ("expansion", "inf", "expansion must be a number > 0, got 'inf'"),
        ("expansion", 10**400, "expansion must be a number > 0, got 1000"),
        ("rms_norm_eps", -1e-5, "rms_norm_eps must be a number > 0, got -1e-05"),
        ("rope_theta", float("inf"), "rope_theta must be a number > 0, got inf"),
        ("halt_exploration_prob", 1.1, "halt_exploration_prob must be a number in [0, 1], got 1.1"),
        ("dropout", 1.0, "dropout must be a number in [0, 1), got 1.0"),
        ("damping", 0, "damping must be a number in (0, 1], got 0"),
        ("damping", 1.1, "damping must be a number in (0, 1], got 1.1"),
        ("noise", -0.1, "noise must be a number >= 0, got -0.1"),
        ("random_init", 2, "random_init must be true or false, got 2"),
        ("dropout", None, "dropout must be a number in [0, 1), got None"),
        ("mlp_t", "maybe", "mlp_t must be true or false, got 'maybe'"),
        ("mlp_t", 2, "mlp_t must be true or false, got 2"),
        ("mlp_t", None, "mlp_t must be true or false, got None"),
        ("no_ACT_continue", "x", "no_ACT_continue must be true or false, got 'x'"),
        ("q_logits", 3, "q_logits must be an integer in [1, 2], got 3"),
        ("intermediate_size", 0, "intermediate_size must be an integer >= 1 or null, got 0"),
        (
            "pos_encodings",
            "roep",
            "pos_encodings must be one of rope, learned, none, got 'roep' (did you mean 'rope'?)",
        ),
        ("pos_encodings", 3, "pos_encodings must be one of rope, learned, none, got 3"),
        ("forward_dtype", "float8", "forward_dtype must be one of bfloat16, float32, float16"),
        ("q_readout", "last", "q_readout must be one of first, mean, got 'last'"),
        ("backend", "CUDA", "backend must be one of auto, cuda, triton, cpp, reference, got"),
        ("policy", "lite", "policy must be one of auto, save, light, recompute, got 'lite'"),
    ],
)
def test_model_config_refuses_bad_values(key, bad, wanted):
    assert message(model, **{key: bad}).startswith(wanted)


def test_model_config_checks_keys_together():
    assert "did you mean 'mlp_t'" in message(model, mlp_tt=True)
    assert "unknown model key 3" in message(ModelConfig.from_dict, {**OFFICIAL, 3: 4})
    tall = "hidden_size must be at least num_heads, got 512 and 513"
    assert message(model, mlp_t=False, num_heads=513) == tall
    assert model(num_heads=513).num_heads == 513  # no heads in an MLP, as in the official code
    twelve = model(mlp_t=False, num_heads=12)  # what the official baseline has
    assert (twelve.head_dim, twelve.attention_width) == (42, 504)
    odd = {"mlp_t": False, "hidden_size": 48, "num_heads": 16, "puzzle_emb_ndim": 0}
    assert "must be even for rope, got 3" in message(model, pos_encodings="rope", **odd)
    assert model(pos_encodings="learned", **odd).head_dim == 3
    assert "at most puzzle_emb_len * hidden_size = 8192" in message(model, puzzle_emb_ndim=8193)
    assert model(puzzle_emb_ndim=8192).prefix_len == 16
    assert "needs q_logits=2" in message(model, q_logits=1, no_ACT_continue=False)


def test_model_config_is_a_value():
    config = model()
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(model())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3  # type: ignore[misc]


def test_arch_config_defaults_are_arch_trm():
    arch = ArchConfig()
    config = arch.model_config(batch_size=4, seq_len=81, vocab_size=11, num_puzzle_identifiers=1)
    assert config == model(batch_size=4, mlp_t=False, pos_encodings="rope")
    assert ArchConfig(hidden_size=256).puzzle_emb_ndim == 256
    assert ArchConfig(hidden_size=256, puzzle_emb_ndim=0).puzzle_emb_ndim == 0
    assert ArchConfig(name="trm") == arch
    assert arch.name == "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1"


def test_arch_config_errors_name_the_dotted_key():
    assert message(ArchConfig, H_cycles=0) == "arch.H_cycles must be an integer >= 1, got 0"
    assert message(ArchConfig, loss_type="mse").startswith("arch.loss_type must be one of stable")
    assert "arch.num_heads" in message(ArchConfig, num_heads=513)
    assert "did you mean 'trm'" in message(ArchConfig, name="tmr")
    known = "trm, trm_singlez, trm_hier6, hrm, transformers_baseline, gated_mlp"
    assert message(ArchConfig, name=None) == f"arch must be one of {known}, got None"
    assert message(ArchConfig, name="hrm") == "hrm needs arch.H_layers >= 1, got 0"


NETWORKS = {
    "trm_singlez": {},
    "trm_hier6": {},
    "hrm": {"H_layers": 4, "L_cycles": 2, "L_layers": 4, "H_cycles": 2},
    "transformers_baseline": {
        "H_layers": 8,
        "num_heads": 12,
        "H_cycles": 1,
        "pos_encodings": "rope",
    },
}


@pytest.mark.parametrize("short", NETWORKS)
def test_other_networks_by_either_name(short):
    own = {"mlp_t": False, **NETWORKS[short]}
    config = model(name=short, **own)
    assert config.kind == short and config.name.startswith(f"recursive_reasoning.{short}@")
    assert config == model(name=config.name, **own) == ModelConfig.from_dict(config.to_dict())


def test_what_the_official_classes_of_other_networks_fix():
    """Their dictionaries have neither of these keys, the baseline's no cycles either."""
    given = {k: v for k, v in OFFICIAL.items() if k not in ("puzzle_emb_len", "no_ACT_continue")}
    hrm = ModelConfig.from_dict(given | {"name": "hrm", "H_layers": 4})
    assert (hrm.prefix_len, hrm.no_ACT_continue, hrm.learns_to_continue) == (1, False, True)
    lacking = {k: v for k, v in given.items() if k not in ("L_cycles", "L_layers", "mlp_t")}
    lacking |= {"name": "transformers_baseline", "H_layers": 8, "H_cycles": 1}
    plain = ModelConfig.from_dict(lacking)
    assert (plain.prefix_len, plain.no_ACT_continue, plain.learns_to_continue) == (1, False, False)
    trm = ModelConfig.from_dict(given)
    assert (trm.prefix_len, trm.no_ACT_continue, trm.learns_to_continue) == (16, True, False)


def test_other_networks_refuse_what_they_do_not_have():
    assert message(model, name="hrm") == "hrm needs H_layers >= 1, got 0"
    wanted = "trm_hier6 has 6 latent levels: L_cycles must be at most that, got 7"
    assert message(model, name="trm_hier6", L_cycles=7) == wanted
    plain = {"name": "transformers_baseline", "H_layers": 2}
    assert "transformers_baseline has no token MLP" in message(model, **plain)


def test_counts_of_blocks_passes_and_states():
    def counts(**values):
        config = model(mlp_t=False, **values)
        return config.blocks, config.passes, config.states

    assert counts() == (2, (42, 14, 7), 2)
    assert counts(name="trm_singlez") == (2, (42, 14, 7), 1)
    assert counts(name="trm_hier6", H_cycles=2) == (2, (28, 14, 7), 7)
    assert counts(name="hrm", H_layers=4, H_cycles=2, L_cycles=3) == (6, (20, 6, 2), 2)
    plain = {"name": "transformers_baseline", "H_layers": 8, "H_cycles": 1, "L_layers": 1}
    assert counts(**plain) == (8, (8, 8, 1), 1)
