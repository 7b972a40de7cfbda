"""from_pretrained, save_pretrained and the hub, whose library is played by a folder here.

Left out: the network. huggingface_hub's own errors are raised, by their classes, from a stand-in.
"""

import json
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from foreign_models import nano_weights
from test_foreign import ASK, OFFICIAL, nano_document, same_model
from tiny import tiny_model

from trm_fast import Model
from trm_fast.checkpoint import save_checkpoint
from trm_fast.config import TrainConfig
from trm_fast.convert import main
from trm_fast.evaluate import main as evaluate_main
from trm_fast.hub import Card, list_files
from trm_fast.interop import load_weights, write_official
from trm_fast.loading import load
from trm_fast.overrides import read_config_file
from trm_fast.pretrained import card_of, read_saved
from trm_fast.runs import place
from trm_fast.solve import main as solve_main


def run_folder(tmp_path, model, ema=None, **config):
    values = {"model": model.config.to_dict(), **config}
    save_checkpoint(
        tmp_path / "run", 9, model=model.state_dict(), ema=ema, config=values, train_state={}
    )
    return tmp_path / "run"


def test_a_folder_of_save_pretrained_gives_the_same_model(tmp_path, monkeypatch):
    model = tiny_model(forward_dtype="bfloat16")
    folder = model.save_pretrained(tmp_path / "mine", step=12)
    assert folder == tmp_path / "mine"
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    got = Model.from_pretrained(folder)
    assert not got.training and got.config == model.config
    same_model(got, model)
    assert read_saved(folder).step == 12
    # A folder that is named by nothing but its place.
    monkeypatch.chdir(folder)
    model.save_pretrained(".")
    assert '\nmodel = Model.from_pretrained("mine")\n' in (folder / "README.md").read_text()
    # Weights for a training run: the same folder by load_checkpoint.
    for source in (folder, folder / "model.safetensors"):
        other = tiny_model(seed=3, forward_dtype="bfloat16")
        assert load_weights(other, source) is None
        same_model(other, model)


def test_a_folder_that_cannot_be_completed_is_as_it_was(tmp_path, monkeypatch):
    folder = tiny_model().save_pretrained(tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ValueError, match="cannot be written: No space left"):
        tiny_model(seed=1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_gives_its_average_or_its_raw_weights(tmp_path):
    raw, ema = tiny_model(0), tiny_model(1)
    run = run_folder(tmp_path, raw, ema.state_dict())
    for source in (run, run / "step_9", run / "last", str(run)):
        same_model(Model.from_pretrained(source), ema)
    same_model(Model.from_pretrained(run, weights="raw"), raw)
    with pytest.raises(ValueError, match="weights must be 'ema' or 'raw', got 'EMA'"):
        Model.from_pretrained(run, weights="EMA")


@pytest.mark.parametrize("to", ["pretrained", "trm_fast"])
@pytest.mark.parametrize("which", ["ema", "raw"])
def test_what_is_kept_alone_says_which_weights_it_is(tmp_path, capsys, which, to):
    source, ours, other = tmp_path / "run", {"raw": 0, "ema": 1}, {"raw": "ema", "ema": "raw"}
    run_folder(tmp_path, tiny_model(0), tiny_model(1).state_dict())
    target = tmp_path / "alone"
    assert main([str(source), str(target), f"--{which}", "--to", to]) == 0
    assert f"{which} weights" in capsys.readouterr().err
    again = tmp_path / "again"  # of the one kind that is left
    assert main([str(target), str(again), "--to", "pretrained"]) == 0
    for folder in (target, again):
        for asked in (None, which):
            loaded = load(folder, weights=asked, device="cpu")
            assert loaded.weights == which
            same_model(loaded.model, tiny_model(ours[which]))
        lacks = {"raw": "no moving average", "ema": "the moving average only"}[which]
        with pytest.raises(ValueError, match=f"the run kept {lacks}; take weights {which}"):
            load(folder, weights=other[which], device="cpu")


def test_files_of_other_projects(tmp_path):
    model = tiny_model(expansion=4.0, intermediate_multiple=256)
    write_official(tmp_path / "step_7", model.state_dict())
    same_model(Model.from_pretrained(tmp_path / "step_7", config=ASK), model)
    with pytest.raises(ValueError, match=r"unknown config key 'H_cycle' \(did you mean 'H_cycles'"):
        Model.from_pretrained(tmp_path / "step_7", config={"H_cycle": 2})
    torch.save(nano_document(), tmp_path / "last.ckpt")
    got = Model.from_pretrained(tmp_path / "last.ckpt", weights="raw")
    assert torch.equal(got.inner.lm_head.weight, nano_weights(7)["lm_head.weight"])


def changed(folder, key):
    """A configuration that asks for ten thousand million of something."""
    config = json.loads((folder / "config.json").read_text())
    config["model"][key] = 10**10
    (folder / "config.json").write_text(json.dumps(config))


def widened(folder):
    """A configuration whose attention alone is gigabytes, of which the file has nothing."""
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= {"hidden_size": 20_000, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "is not a configuration of trm_fast"),
        (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 30), "is not safetensors"),
        (
            lambda f: (f / "config.json").write_text('{"library_name": "trm_fast", "model": 1}'),
            "the model's configuration is missing",
        ),
        (
            lambda f: safetensors.torch.save_file({"a": torch.ones(3000)}, f / "model.safetensors"),
            "weights do not fit config.json",
        ),
        *(
            (lambda f, key=key: changed(f, key), f"config.json: {key} is larger than any such")
            for key in (
                *("vocab_size", "intermediate_size", "L_layers", "seq_len", "batch_size"),
                *("H_cycles", "L_cycles", "halt_max_steps"),
            )
        ),
        (widened, r"weights do not fit config.json \(\S+ is \[.*this model has \[.*20000"),
        (lambda f: changed(f, "num_puzzle_identifiers"), "puzzle_emb_ndim is larger than any"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, change, said):
    folder = tiny_model().save_pretrained(tmp_path / "mine")
    change(folder)
    with pytest.raises(ValueError, match=said) as caught:
        Model.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_what_no_shape_says_is_bounded_too(tmp_path, monkeypatch, positions):
    folder = tiny_model(pos_encodings=positions).save_pretrained(tmp_path / "mine")
    config = Model.from_pretrained(folder).config
    size, said = config.total_len * config.head_dim, "seq_len . hidden_size"
    if positions == "learned":
        size, said = config.batch_size * config.puzzle_emb_ndim, "batch_size . puzzle_emb_ndim"
    monkeypatch.setattr("trm_fast.pretrained._TABLE", size - 1)
    with pytest.raises(ValueError, match=f"{said} .*is larger than any .*: {size}, up to"):
        Model.from_pretrained(folder)
    monkeypatch.setattr("trm_fast.pretrained._TABLE", size)
    assert Model.from_pretrained(folder).config == config


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny_model()
    model.inner.lm_head.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="raw weights are not finite in inner.lm_head.weight"):
        Model.from_pretrained(tmp_path / "mine")


# The hub


class HTTPError(Exception):
    """As the HTTP library's own base: of no class that Python has for it."""


class ConnectError(HTTPError):
    pass


class FakeHub(types.ModuleType):
    """Repositories as folders below `root`; what huggingface_hub calls by the same names does."""

    def __init__(self, root, offline=False):
        super().__init__("huggingface_hub")
        self.root, self.offline, self.made = Path(root), offline, []
        self.errors = types.SimpleNamespace(
            LocalEntryNotFoundError=type("LocalEntryNotFoundError", (FileNotFoundError,), {}),
            EntryNotFoundError=type("EntryNotFoundError", (OSError,), {}),
            HfHubHTTPError=type("HfHubHTTPError", (HTTPError, OSError), {}),
        )

    def hf_hub_download(self, repo, file, revision=None):
        if isinstance(self.offline, Exception):
            raise self.offline
        if self.offline:
            raise self.errors.LocalEntryNotFoundError("outgoing traffic is disabled\nsecond line")
        if not (self.root / repo).is_dir():
            raise OSError("404: no such repository")
        path = self.root / repo / (revision or "") / file
        if not path.is_file():
            raise self.errors.EntryNotFoundError(file)
        cached = self.root.parent / "cache" / repo / file
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_bytes(path.read_bytes())
        return str(cached)

    def list_repo_files(self, repo, revision=None):
        if self.offline:
            raise ConnectError("no route")
        return [path.name for path in (self.root / repo).iterdir()]

    def create_repo(self, repo, private, exist_ok):
        if self.offline:
            raise ConnectError("no route")
        self.made.append((repo, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        target = self.root / repo_id
        target.mkdir(parents=True, exist_ok=True)
        for name in delete_patterns:
            (target / name).unlink(missing_ok=True)
        for path in Path(folder_path).iterdir():
            (target / path.name).write_bytes(path.read_bytes())


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    library = FakeHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", library.errors)
    return library


def test_to_the_hub_and_back(fake_hub, monkeypatch):
    model = tiny_model()
    card = Card("1,000 boards", "trm-fast train x=1", {"all/exact_accuracy": 0.5}, "mit")
    assert model.push_to_hub("me/tiny", card=card, private=True) == (
        "https://huggingface.co/me/tiny"
    )
    assert fake_hub.made == [("me/tiny", True, True)]
    same_model(Model.from_pretrained("me/tiny"), model)
    same_model(Model.from_pretrained("hf://me/tiny"), model)
    text = (fake_hub.root / "me/tiny/README.md").read_text()
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert head.splitlines()[0] == "library_name: trm_fast" and "license: mit" in head
    for line in ("| `H_cycles` | 2 |", "1,000 boards", "trm-fast train x=1", "# me/tiny"):
        assert line in body, line
    assert "| all/exact_accuracy | 0.5 |" in body
    assert 'Model.from_pretrained("me/tiny")' in body
    with pytest.raises(ValueError, match="me: not of the form owner/name"):
        model.push_to_hub("me")


def test_files_of_other_projects_from_the_hub(fake_hub):
    model = tiny_model(expansion=4.0, intermediate_multiple=256)
    repo = fake_hub.root / "lab" / "weights"
    write_official(repo / "step_7", model.state_dict())
    (repo / "all_config.yaml").write_text("arch: {H_cycles: 2, L_cycles: 2, puzzle_emb_len: 2}")
    rest = {"num_heads": 2, "seq_len": 10}
    assert (
        read_saved("hf://lab/weights", file="step_7", given=rest)
        .notes[-1]
        .endswith("all_config.yaml")
    )
    same_model(Model.from_pretrained("lab/weights", file="step_7", config=rest), model)
    with pytest.raises(ValueError, match=r"has no config.json; name one of its files: all_conf"):
        Model.from_pretrained("lab/weights")
    with pytest.raises(ValueError, match=r"has no step_8; name one of its files: .*step_7"):
        Model.from_pretrained("lab/weights", file="step_8")


def test_a_hub_that_cannot_be_reached(tmp_path, fake_hub, monkeypatch):
    with pytest.raises(ValueError, match="me/none: config.json cannot be fetched: 404"):
        Model.from_pretrained("me/none")
    fake_hub.offline = True
    with pytest.raises(ValueError, match=r"not in the local cache, and the hub cannot be .*\)$"):
        Model.from_pretrained("me/none")
    # Of the weights alone there is a copy here: what may stand beside them is not asked for.
    copy = tmp_path / "step_7"
    write_official(copy, tiny_model(**OFFICIAL).state_dict())
    real = fake_hub.hf_hub_download
    monkeypatch.setattr(
        fake_hub,
        "hf_hub_download",
        lambda repo, file, revision: str(copy) if file == "step_7" else real(repo, file),
    )
    assert Model.from_pretrained("me/none", file="step_7", config=ASK).config.H_cycles == 2
    with pytest.raises(ValueError, match="me/tiny: cannot be sent: no route"):
        tiny_model().push_to_hub("me/tiny")
    assert list_files("me/none") == []
    fake_hub.offline = ConnectError("no route")
    with pytest.raises(ValueError, match="config.json cannot be fetched: no route"):
        Model.from_pretrained("me/none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"needs huggingface_hub \(pip install 'trm-fast\[hub\]'"):
        Model.from_pretrained("me/none")
    with pytest.raises(ValueError, match=r"pip install 'trm-fast\[hub\]'"):
        tiny_model().push_to_hub("me/tiny")
    with pytest.raises(ValueError, match="no such checkpoint"):
        Model.from_pretrained("not-there")
    with pytest.raises(ValueError, match="hf://x: not of the form hf://owner/name"):
        Model.from_pretrained("hf://x")


def test_the_hubs_own_library_offline(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="config.json .*can(not|'t|not be)") as caught:
        Model.from_pretrained("me/tiny-model-that-is-not-there")
    assert "\n" not in str(caught.value)


# The commands


def sudoku_model(**changes):
    return tiny_model(seq_len=16, vocab_size=6, halt_max_steps=2, **changes)


PUZZLE = "1..." + "." * 12


def test_solve_and_evaluate_take_what_from_pretrained_takes(tmp_path, fake_hub, capsys):
    model = sudoku_model()
    run = run_folder(tmp_path, model)
    model.push_to_hub("me/four")
    document = nano_document(sudoku=True)
    torch.save(document, tmp_path / "last.ckpt")
    folder = model.save_pretrained(tmp_path / "mine")
    (tmp_path / "boards.csv").write_text("quizzes,solutions\n1000000000000000,1234341221434321\n")
    answers, reports = [], []
    for source in (run, folder, "hf://me/four", tmp_path / "last.ckpt"):
        assert solve_main(["-m", str(source), "--json", "--device=cpu", PUZZLE]) in (0, 1)
        answers.append(json.loads(capsys.readouterr().out)["answers"][0]["answer"])
        command = [str(source), "--csv", str(tmp_path / "boards.csv"), "--json", "--device=cpu"]
        assert evaluate_main(command) == 0
        reports.append(json.loads(capsys.readouterr().out)["sets"]["all"]["accuracy"])
    assert answers[0] == answers[1] == answers[2] and reports[0] == reports[1] == reports[2]
    assert len(answers[3]) == 16
    # Typing errors do not become questions to the hub.
    assert solve_main(["-m", "me/four", PUZZLE]) == 3
    assert "me/four: no such checkpoint" in capsys.readouterr().err


def test_convert_says_what_it_did_and_keeps_both_weights(tmp_path, capsys):
    torch.save(nano_document(), tmp_path / "last.ckpt")
    command = [str(tmp_path / "last.ckpt"), str(tmp_path / "run")]
    assert main(command) == 0
    out = capsys.readouterr()
    assert out.out == f"{command[0]} -> {command[1]} (trm_fast)\n"
    assert "step_120: raw and ema weights" in out.err
    assert main([*command, "--step=121"]) == 0  # beside what was converted before
    saved = read_saved(tmp_path / "run" / "step_120")
    assert saved.ema is not None and saved.config["source"] == "nano-trm: last.ckpt"
    assert torch.equal(saved.model["inner.q_head.weight"], nano_weights(7)["q_head.weight"])
    assert torch.equal(saved.ema["inner.q_head.weight"], nano_weights(7)["q_head.weight"] / 2)
    for flag, which in (("--ema", saved.ema), ("--raw", saved.model)):
        assert main([*command[:1], str(tmp_path / flag), flag, "--step=5"]) == 0
        only = read_saved(tmp_path / flag)
        assert (only.ema, only.step) == (None, 5)
        assert torch.equal(only.model["inner.q_head.weight"], which["inner.q_head.weight"])


def test_convert_to_a_folder_and_to_the_hub(tmp_path, fake_hub, capsys):
    model = sudoku_model()
    run = run_folder(tmp_path, model, data={"data_paths": ["data/four"]}, lr=0.5, arch={})
    (run / "metrics.jsonl").write_text(
        '{"step": 9, "train/lm_loss": 1.0, "all/exact_accuracy": 0.25}\n'
        '{"step": 8, "all/exact_accuracy": 0.75}\n'
    )
    card = card_of(read_saved(run))
    assert card.data == "data/four" and card.metrics == {"all/exact_accuracy": 0.25}
    assert card.command == "trm-fast train arch=trm lr=0.5"
    assert main([str(run), str(tmp_path / "mine"), "--to=pretrained"]) == 0
    assert "data/four" in (tmp_path / "mine" / "README.md").read_text()
    assert main([str(run), "me/four", "--to=hub", "--private"]) == 0
    assert "https://huggingface.co/me/four" in capsys.readouterr().err
    got = Model.from_pretrained("me/four")
    assert torch.equal(got.inner.lm_head.weight, model.inner.lm_head.weight)


def test_a_q_threshold_goes_to_the_hub_and_with_the_next_model_away(fake_hub):
    model = sudoku_model()
    model.q_threshold = 2.5
    model.push_to_hub("me/four")
    assert Model.from_pretrained("me/four").q_threshold == 2.5
    model.q_threshold = None
    model.push_to_hub("me/four")
    assert not (fake_hub.root / "me" / "four" / "q_threshold.json").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["none", "run"], 3, "none: no such checkpoint"),
        (["a.ckpt"], 2, "required: TARGET"),
        (["a.ckpt", "run", "--to=onnx"], 2, "invalid choice: 'onnx'"),
        (["mine", "run", "--H-cycles=99"], 3, "settings itself; H_cycles is for files of other"),
        (["mine", "run", "--config=x.yaml"], 3, "the configuration x.yaml is for files of other"),
        (["mine", "run", "--file=x"], 3, "mine: is here; file and revision are for repositories"),
        (["a.ckpt", "run", "--carry=init"], 3, "is of nano-trm, which has no carry to choose"),
        (["a.ckpt", "run", "--semantics=v1"], 3, "nano-trm, which has no semantics to choose"),
        (["mine", "trained"], 2, "trained: holds a run (step_9) already; name another folder"),
        (["a.ckpt", "run", "--from=rs"], 3, "names are those of nano-trm, not of rs"),
        (["a.ckpt", "run", "--from=trm_fast"], 3, "a.ckpt: is not a run of trm_fast"),
        (["a.ckpt", "run", "--H-cycles=0"], 2, "'0' is not a whole number"),
        (["a.ckpt", ".", "--to=nano-trm"], 2, ".: is a folder; nano-trm is one file"),
        (["mine", "run", "--from=rs"], 3, "mine: is not a file of rs"),
        (["mine", "run", "--ema"], 3, "kept no moving average"),
        (["a.ckpt", "a.ckpt/run"], 3, "cannot be written"),
    ],
)
def test_convert_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, status, said):
    monkeypatch.chdir(tmp_path)
    torch.save(nano_document(), "a.ckpt")
    tiny_model().save_pretrained("mine")
    (Path("trained") / "step_9").mkdir(parents=True)
    (Path("trained") / "step_9" / "config.json").write_text("{}")
    capsys.readouterr()
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_converted_weights_start_a_run_and_are_not_gone_on_with(tmp_path):
    torch.save(nano_document(sudoku=True), tmp_path / "last.ckpt")
    assert main([str(tmp_path / "last.ckpt"), str(tmp_path / "run")]) == 0
    file = tmp_path / "run" / "step_120" / "config.json"
    config = TrainConfig.from_flat(read_config_file(file))
    sizes = {"batch_size": 2, "seq_len": 16, "vocab_size": 6, "num_puzzle_identifiers": 3}
    model = Model(config.arch.model_config(**sizes))
    load_weights(model, tmp_path / "run")
    averaged = read_saved(tmp_path / "run").ema
    assert torch.equal(model.inner.lm_head.weight, averaged["inner.lm_head.weight"])
    going_on = config.replace({"checkpoint_path": str(tmp_path / "run")})
    with pytest.raises(ValueError, match=r"run holds converted weights, not a run .*load_checkp"):
        place(going_on, 10)
