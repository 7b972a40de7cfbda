"""overrides: the official command lines, the grammar of values, files, help and every raise."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from config_errors import message
from hypothesis import given, settings
from hypothesis import strategies as st

from trm_fast.config import (
    PRESETS,
    ArchConfig,
    ConfigError,
    TrainConfig,
    from_preset,
    option_fields,
)
from trm_fast.overrides import (
    HelpRequested,
    emit_yaml,
    format_value,
    help_text,
    option_rows,
    parse_train,
    parse_value,
    read_config_file,
)

DOCS = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

# The arguments of the official README's commands, as they stand there after `pretrain.py`.
_SUDOKU_HYPERPARAMETERS = r"""
data_paths="[data/sudoku-extreme-1k-aug-1000]" \
evaluators="[]" \
epochs=50000 eval_interval=5000 \
lr=1e-4 puzzle_emb_lr=1e-4 weight_decay=1.0 puzzle_emb_weight_decay=1.0 \
"""
_ARC = r"""arch=trm \
data_paths="[data/{}]" \
arch.L_layers=2 \
arch.H_cycles=3 arch.L_cycles=4 \
+run_name=${{run_name}} ema=True
"""
README = {
    "arc1": _ARC.format("arc1concept-aug-1000"),
    "arc2": _ARC.format("arc2concept-aug-1000"),
    "sudoku-extreme": "arch=trm \\"
    + _SUDOKU_HYPERPARAMETERS
    + r"""arch.mlp_t=True arch.pos_encodings=none \
arch.L_layers=2 \
arch.H_cycles=3 arch.L_cycles=6 \
+run_name=${run_name} ema=True
""",
    "sudoku-extreme-attention": "arch=trm \\"
    + _SUDOKU_HYPERPARAMETERS
    + r"""arch.L_layers=2 \
arch.H_cycles=3 arch.L_cycles=6 \
+run_name=${run_name} ema=True
""",
    "maze-hard": "arch=trm \\"
    + _SUDOKU_HYPERPARAMETERS.replace("sudoku-extreme-1k-aug-1000", "maze-30x30-hard-1k")
    + r"""arch.L_layers=2 \
arch.H_cycles=3 arch.L_cycles=4 \
+run_name=${run_name} ema=True
""",
}


def shell(line: str, run_name: str = "") -> list[str]:
    """The arguments as a shell passes them on."""
    return shlex.split(line.replace("${run_name}", run_name).replace("\\\n", " "))


@pytest.mark.parametrize("name", README)
def test_readme_command_line_equals_its_preset(name):
    config = parse_train(shell(README[name], "my_run"))
    expected = from_preset(name).to_dict() | {"preset": None, "run_name": "my_run"}
    assert config.to_dict() == expected
    # Without the shell variable set, `+run_name=` is empty and means: no name given.
    assert parse_train(shell(README[name])).run_name is None


def test_readme_sudoku_command_line_by_value():
    config = parse_train(shell(README["sudoku-extreme"], "pretrain_mlp_t_sudoku"))
    assert config.data_paths == ("data/sudoku-extreme-1k-aug-1000",) and config.evaluators == ()
    assert (config.epochs, config.eval_interval, config.steps) == (50000, 5000, None)
    assert (config.lr, config.puzzle_emb_lr) == (1e-4, 1e-4)
    assert (config.weight_decay, config.puzzle_emb_weight_decay) == (1.0, 1.0)
    assert (config.global_batch_size, config.optimizer, config.ema) == (768, "adam_atan2", True)
    assert (config.arch.mlp_t, config.arch.pos_encodings) == (True, "none")
    assert (config.arch.puzzle_emb_ndim, config.arch.forward_dtype) == (512, "bfloat16")
    assert config.run_name == "pretrain_mlp_t_sudoku" and config.preset is None
    smaller = parse_train([*shell(README["sudoku-extreme"]), "global_batch_size=8"])
    assert smaller.global_batch_size == 8


def test_recorded_command_lines_stand_in_the_official_readme(official_path):
    text = (official_path / "README.md").read_text(encoding="utf-8")
    commands = [part.partition("pretrain.py ")[2] for part in text.split('run_name="pretrain_')]
    found = [shell(part.partition("ema=True")[0] + "ema=True", "x") for part in commands[1:]]
    assert sorted(found) == sorted(shell(line, "x") for line in README.values())


def test_official_files_are_our_base(official_path):
    folder = official_path / "config"
    assert parse_train([f"config={folder / 'cfg_pretrain.yaml'}"]) == TrainConfig()
    # The architecture file on its own, as it would stand under `arch:`.
    yaml = pytest.importorskip("yaml")
    arch = yaml.safe_load((folder / "arch" / "trm.yaml").read_text(encoding="utf-8"))
    assert TrainConfig.from_dict({"arch": arch}) == TrainConfig()


# Which base


def test_bases():
    assert parse_train([]) == from_preset("sudoku-mini")
    assert parse_train(["arch=trm"]) == TrainConfig()
    assert parse_train(["lr=0.5"]) == from_preset().replace({"lr": 0.5})
    for name in PRESETS:
        assert parse_train([f"preset={name}"]) == from_preset(name)
        again = f"arch={from_preset(name).arch.kind}"
        assert parse_train(["--preset", name, again]) == from_preset(name)
    for key in ("data_paths", "data_path", "--data-path"):
        config = parse_train([f"{key}=[d]"])
        assert (config.preset, config.data_paths, config.generate) == ("sudoku-mini", ("d",), 0)
    assert parse_train(["arch=trm", "generate=5"]).data_paths == ()
    assert parse_train(["epochs=6"]).steps is None
    assert parse_train(["arch=trm", "arch.hidden_size=256"]).arch.puzzle_emb_ndim == 256
    given = parse_train(["arch=trm", "arch.hidden_size=256", "arch.puzzle_emb_ndim=512"])
    assert given.arch.puzzle_emb_ndim == 512
    assert parse_train(["arch.hidden_size=64"]).arch.puzzle_emb_ndim == 0


def test_another_network_brings_its_official_sizes():
    assert parse_train(["arch=trm_singlez"]).arch == ArchConfig(name="trm_singlez")
    hrm = parse_train(["arch=hrm", "arch.L_layers=2"]).arch
    assert (hrm.H_cycles, hrm.L_cycles, hrm.H_layers, hrm.L_layers) == (2, 2, 4, 2)
    assert (hrm.puzzle_emb_len, hrm.no_ACT_continue, hrm.num_heads) == (0, False, 8)
    plain = parse_train(["arch=transformers_baseline"]).arch
    assert (plain.H_cycles, plain.H_layers, plain.num_heads, plain.hidden_size) == (1, 8, 12, 512)
    small = parse_train(["preset=sudoku-mini", "arch=hrm", "arch.q_logits=2"]).arch
    assert (small.hidden_size, small.H_layers, small.H_cycles) == (48, 4, 2)
    again = parse_train(["arch.H_layers=3", "arch=hrm"])
    assert again.arch.H_layers == 3 and again.replace({"seed": 1}).arch == again.arch
    assert again.replace({"arch": "hrm"}) == again
    other = again.replace({"arch": "trm_hier6"})
    assert other.arch == ArchConfig(name="trm_hier6") and other.replace({"arch": "trm"}).arch == (
        ArchConfig()
    )
    gated = parse_train(["preset=gated-mlp", "arch.hidden_size=64"])
    assert gated.replace({"arch": "trm"}).arch == ArchConfig(hidden_size=64)


def test_order_is_base_preset_file_command_line(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text('{"lr": 0.3, "beta1": 0.3, "arch": {"L_cycles": 9}}')
    second.write_text('{"beta1": 0.4, "arch.H_cycles": 8}')
    argv = ["seed=4", f"--config={first}", f"config={second}", "lr=0.5", "preset=maze-hard"]
    config = parse_train(argv)
    assert (config.preset, config.epochs, config.beta2) == ("maze-hard", 50000, 0.95)
    assert (config.arch.L_cycles, config.arch.H_cycles, config.beta1) == (9, 8, 0.4)
    assert (config.lr, config.seed) == (0.5, 4)
    first.write_text('{"preset": "arc1", "seed": 3}')
    assert parse_train(["--config", str(first)]) == from_preset("arc1").replace({"seed": 3})
    assert parse_train(["--config", str(first), "preset=arc2"]).preset == "arc2"
    first.write_text('{"epochs": 7}')
    assert parse_train(["--config", str(first)]).steps is None
    # A file that names an architecture, as the official all_config.yaml does, is a whole run.
    first.write_text('{"arch": {"name": "trm"}, "seed": 3}')
    assert parse_train([f"--config={first}"]) == TrainConfig(seed=3)


# How options are written


@pytest.mark.parametrize(
    "argv",
    [
        ["lr_min_ratio=0.5", "ema=false", "arch.L_cycles=3", "data_paths=[a]"],
        ["+lr_min_ratio=.5", "++ema=False", "+arch.L_cycles=3", "+data_paths=a"],
        ["--lr-min-ratio", "5e-1", "--ema", "false", "--arch.L-cycles=3", "--data-paths", "[a]"],
        ["--lr_min_ratio=0.5", "--ema=0", "--arch.L_cycles", "3", "--data_paths=['a']"],
        [
            "lr_min_ratio=1",
            "lr_min_ratio='0.5'",
            "ema=off",
            "arch.L_cycles=3.0",
            'data_paths="[a]"',
        ],
    ],
)
def test_spellings(argv):
    config = parse_train(argv)
    assert (config.lr_min_ratio, config.ema, config.arch.L_cycles) == (0.5, False, 3)
    assert config.data_paths == ("a",)


def test_flags_without_a_value_are_true():
    assert parse_train(["--official"]).official is True
    config = parse_train(["--official", "seed=3", "--arch.mlp-t", "--compile", "TRUE"])
    assert (config.official, config.seed, config.compile) == (True, 3, True)
    assert message(parse_train, ["--seed"]) == "--seed needs a value"
    assert message(parse_train, ["--seed", "--ema"]) == "--seed needs a value"
    assert message(parse_train, ["--config"]) == "--config needs a value"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a,b]", ("a", "b")),
        ("[ a , b ]", ("a", "b")),
        ("['a',\"b\"]", ("a", "b")),
        ("'[a,b]'", ("a", "b")),
        ("\"['a','b']\"", ("a", "b")),
        ("a,b", ("a", "b")),
        ("'a,b'", ("a,b",)),
        ("['a,b']", ("a,b",)),
        (r"['it\'s']", ("it's",)),
        (r"[C:\data\x]", (r"C:\data\x",)),
        ("[2024,1e-4,true,null]", ("2024", "1e-4", "true", "null")),
        ("[data/a b]", ("data/a b",)),
    ],
)
def test_lists_of_texts(text, expected):
    assert parse_train([f"data_paths={text}"]).data_paths == expected


def test_evaluators():
    for text in ("[]", "'[]'", "[ ]"):
        assert parse_train(["arch=trm", f"evaluators={text}"]).evaluators == ()
    for text in ("[{name: arc@ARC}]", "[{'name':'arc@ARC'}]", "[arc@ARC]", "arc@ARC"):
        config = parse_train([f"evaluators={text}"])
        assert [item.to_dict() for item in config.evaluators] == [{"name": "arc@ARC"}]
    config = parse_train(["evaluators=[{name: arc@ARC, submission_K: 2}]"])
    assert config.evaluators[0].to_dict() == {"name": "arc@ARC", "submission_K": 2}


def test_texts_stay_texts():
    assert parse_train(["run_name=1234"]).run_name == "1234"
    assert parse_train(["run_name=true"]).run_name == "true"
    assert parse_train(["run_name='null'"]).run_name == "null"
    assert parse_train(["run_name=a=b,c [d]"]).run_name == "a=b,c [d]"
    for nothing in ("", "null", "None", "  "):
        assert parse_train([f"+run_name={nothing}"]).run_name is None
    assert parse_train(["keep="]).keep is None and parse_train(["keep=None"]).keep is None
    assert parse_train(["arch.pos_encodings=null"]).arch.pos_encodings == "none"
    assert parse_train(["arch.loss.loss_type=softmax_cross_entropy"]).arch.loss_type == (
        "softmax_cross_entropy"
    )
    assert parse_train(["arch.loss.name=losses@ACTLossHead", "arch.causal=true"]) == from_preset()


@pytest.mark.parametrize(
    ("token", "wanted"),
    [
        ("evalinterval=3", "unknown key 'evalinterval' (did you mean 'eval_interval'?)"),
        ("mlp_t=True", "unknown key 'mlp_t' (did you mean 'arch.mlp_t'?)"),
        ("--evil", "unknown key 'evil'"),
        ("hydra.run.dir=x", "unknown key 'hydra.run.dir'"),
        ("lr=abc", "lr must be a number >= 0, got 'abc'"),
        ("lr=", "lr has no value"),
        ("lr=[1]", "lr must be a number >= 0, got [1]"),
        ("lr='a", "lr: cannot read \"'a\": the closing ' is missing"),
        ("lr=1e999", "lr must be a number >= 0, got '1e999'"),
        ("ema=perhaps", "ema must be true or false, got 'perhaps'"),
        ("epochs=true", "epochs must be an integer >= 1, got True"),
        ("data_paths=[a", "data_paths: cannot read '[a': the closing ] is missing"),
        ("data_paths=[a,,b]", "data_paths: cannot read '[a,,b]': a value is missing"),
        ("data_paths=[a]b", "data_paths: cannot read '[a]b': nothing may follow the value, found"),
        ("data_paths=", "data_paths has no value"),
        ("evaluators=[{name}]", "evaluators: cannot read '[{name}]': a key in { } needs a colon"),
        ("evaluators=" + "[" * 99, "evaluators: cannot read"),
        ("evaluators=[{}]", "evaluators must be a list of names or of {name: NAME, option: value}"),
        ("run_name='' ''", "run_name: cannot read"),
        ("~ema", "'~ema': keys cannot be taken away, only set"),
        ("-x", "'-x' is not key=value; see --help"),
        ("-x=3", "'-x=3' is not key=value; see --help"),
        ("=3", "'=3' has no key; see --help"),
        ("--=3", "'--=3' has no key; see --help"),
        ("", "'' is not key=value; see --help"),
        ("lr", "'lr' is not key=value (did you mean lr=VALUE?); see --help"),
        ("epoch", "'epoch' is not key=value (did you mean 'epochs'?); see --help"),
        ("arc1", "'arc1' is not key=value (did you mean preset=arc1?); see --help"),
        ("preset=arc3", "preset must be one of sudoku-mini, "),
        ("preset=[]", "preset must be one of sudoku-mini, "),
        ("arch=tmr", "arch must be one of trm, trm_singlez, "),
        ("arch=", "arch.name has no value"),
        ("arch.loss.name=x", "arch.loss.name must be losses@ACTLossHead, got 'x'"),
        ("config=x.toml", "config must be a .json or .yaml file, got 'x.toml'"),
        ("config=", "config must be a .json or .yaml file, got '.'"),
    ],
)
def test_wrong_tokens_are_one_line(token, wanted):
    assert message(parse_train, [token]).startswith(wanted)


def test_presets_hint_names_the_close_one():
    assert message(parse_train, ["preset=sudoku-min"]).endswith("(did you mean 'sudoku-mini'?)")


# Values, forth and back


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("007", "007"),
        ("1_000", "1_000"),
        ("None", None),
        ("none", "none"),
        ("True", True),
        ("yes", "yes"),
        ("nan", "nan"),
        ("{a: 1, 'b c': [x, {}], d: null}", {"a": 1, "b c": ["x", {}], "d": None}),
        (r"'a\\b\'c\d'", r"a\b'c\d"),
        ("'1'", "1"),
    ],
)
def test_parse_value(text, value):
    result = parse_value(text)
    assert result == value and type(result) is type(value)
    assert parse_value(format_value(value)) == value


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["", "null", "1e5", "1e-05", "yes", "y", "-", "~", "a: b", "#", "0x1f", "'"])
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(VALUES)
def test_values_survive_the_command_line_grammar(value):
    result = parse_value(format_value(value))
    assert result == value and type(result) is type(value)


@settings(deadline=None)
@given(VALUES)
def test_values_survive_yaml(value):
    yaml = pytest.importorskip("yaml")
    result = yaml.safe_load(emit_yaml(value))
    assert result == value and type(result) is type(value)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.text(max_size=30)
        | st.tuples(st.sampled_from(sorted(option_fields())), st.text(max_size=30)).map("=".join)
        | st.text("[]{}:,'\"\\ =a-~+", max_size=12).map("evaluators={}".format),
        max_size=3,
    )
)
def test_hostile_command_lines_raise_config_error_only(argv):
    try:
        parse_train([token for token in argv if not token.startswith("config")])
    except (ConfigError, HelpRequested) as error:
        assert len(str(error).splitlines()) <= 1
        assert len(str(error)) < 400


# Files


def test_our_config_json_gives_the_same_run(tmp_path):
    for argv in ([], ["arch=trm", "seed=3"], ["preset=maze-hard", "steps=5", "run_name=x y"]):
        config = parse_train(argv)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config.to_dict()))
        assert parse_train([f"--config={path}"]) == config


def test_official_all_config_yaml_forth_and_back(tmp_path):
    yaml = pytest.importorskip("yaml")
    config = parse_train(shell(README["sudoku-extreme"], "run:1")).with_names(0)
    text = emit_yaml(config.official_dict())
    assert yaml.safe_load(text) == config.official_dict()
    assert "lr: 0.0001\n" in text and "evaluators: []\n" in text and "H_layers: 0\n" in text
    path = tmp_path / "all_config.yaml"
    path.write_text(text)
    assert parse_train([f"config={path}"]) == config


def test_official_base_file_is_read(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "cfg.yml"
    path.write_text(
        "defaults:\n  - arch: trm\n  - _self_\nhydra:\n  output_subdir: null\nlr: 1e-4\n"
        "arch.puzzle_emb_ndim: ${.hidden_size}\narch.hidden_size: 64\n"
    )
    config = parse_train(["--config", str(path)])
    assert config == TrainConfig().replace({"arch.hidden_size": 64, "arch.puzzle_emb_ndim": 64})


def test_yaml_without_pyyaml_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "needs PyYAML: pip install 'trm-fast[compat]'" in message(read_config_file, path)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.json", b"{", "a.json is not JSON: "),
        ("a.json", b"[" * 100000, "a.json is not JSON: "),
        ("a.json", b"1" * 5000, "a.json is not JSON: "),
        ("a.json", b"[1]", "a.json must hold keys and values, got [1]"),
        ("a.json", b"\xff\xfe", "a.json': not UTF-8 text"),
        ("a.json", b'{"lrr": 1}', "a.json: unknown key 'lrr' (did you mean 'lr'?)"),
        ("a.json", b'{"arch": 3}', "arch must be one of trm, trm_singlez, "),
        ("a.json", b'{"arch": {"loss": 3}}', "a.json: unknown key 'arch.loss'"),
        ("a.json", b'{"preset": [1]}', "preset must be one of"),
        ("a.json", b'{"lr": NaN}', "lr must be a number >= 0, got nan"),
        ("a.json", b'{"generate": {}}', "generate must be an integer >= 0, got {}"),
        ("a.json", b'{"defaults": 3, "lr": 1}', "a.json: defaults must be a list"),
        ("a.yaml", b"a: [", "a.yaml is not YAML: "),
        ("a.yaml", b"lr: 2001-99-99", "a.yaml is not YAML: "),
        ("a.yaml", b"? [a]\n: 3", "a.yaml is not YAML"),
        ("a.yaml", b"", "a.yaml must hold keys and values, got None"),
        ("a.yaml", b"3: 4", "a.yaml: unknown key 3"),
        ("a.yaml", b"lr: 2001-01-01", "lr must be a number >= 0, got datetime.date(2001, 1, 1)"),
    ],
)
def test_bad_files_are_one_line(tmp_path, monkeypatch, name, content, wanted):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert wanted in message(parse_train, ["--config", name])


def test_missing_files_are_one_line(tmp_path):
    assert "No such file" in message(parse_train, ["config=nowhere.json"])
    (tmp_path / "d.json").mkdir()
    assert "cannot read config" in message(parse_train, [f"config={tmp_path / 'd.json'}"])


# Help and documentation


def test_help_is_asked_for():
    for argv in (["--help"], ["-h"], ["lr=1", "--help", "nonsense"]):
        with pytest.raises(HelpRequested):
            parse_train(argv)


def test_help_lists_every_key_default_and_preset():
    lines = help_text().splitlines()
    assert max(len(line) for line in lines) <= 100
    words = {tuple(line.split()[:2]) for line in lines}
    for key, field in option_fields().items():
        if key not in ("arch.name", "arch.puzzle_emb_ndim", "evaluators"):
            assert (key, format_value(field.default)) in words, key
    assert {("arch.name", "trm"), ("arch.puzzle_emb_ndim", "hidden_size")} <= words
    assert ("config", "null") in words and ("evaluators", "[arc@ARC]") in words
    for name in PRESETS:
        assert f"  {name}" in [line.partition(" (")[0] for line in lines]
    # What the help says is what a run without settings does.
    rows = {key: default for _, key, default, _ in option_rows() if key not in ("config", "preset")}
    defaults = [f"{key}={value}" for key, value in rows.items() if value != "hidden_size"]
    assert parse_train(["arch=trm", *defaults]) == TrainConfig()


def test_documentation_has_the_same_table():
    page = DOCS.read_text(encoding="utf-8")
    keys = page.partition("## Keys")[2]
    table = [line for line in keys.splitlines() if line.startswith("| `")]
    assert table == [f"| `{key}` | `{value}` | {text} |" for _, key, value, text in option_rows()]
    for name in PRESETS:
        assert f"`{name}`" in page
