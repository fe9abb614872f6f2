"""The command line: what it prints and writes, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import fresh
from PIL import Image

from lambda_maml import checkpoint, cli, cli_demo, data, models
from lambda_maml.cli_types import TEST_SEED
from lambda_maml.evaluate import evaluate
from lambda_maml.learned_rates import load_rates
from lambda_maml.timing import STOCK, timing_info

COMMANDS = ["demo", "train", "methods", "select", "eval", "adapt", "predict", "export", "report", "info"]


def call(*args: Any) -> int:
    return cli.run([str(arg) for arg in args])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a checkpoint of two iterations on glyphs."""
    out = tmp_path_factory.mktemp("run")
    small = ["--width", 4, "--steps", 2, "--lr", 0.1, "--query", 3, "--val-tasks", 3, "--val-every", 2]
    assert call("train", "--out", out, "--iterations", 2, *small) == 0
    return out


@pytest.fixture(scope="module")
def zero_head(tmp_path_factory) -> Path:
    """The same with a zero head and rates per layer and step, as a checkpoint."""
    out = tmp_path_factory.mktemp("zero")
    small = ["--width", 4, "--steps", 2, "--lr", 0.4, "--query", 3, "--val-tasks", 3, "--val-every", 2]
    assert call("train", "--out", out, "--iterations", 2, *small, "--zero-head", "--learn-lr", "layer-step") == 0
    return out / "best.safetensors"


@pytest.fixture(scope="module")
def selected(trained) -> Path:
    assert call("select", trained / "best.safetensors", "--tasks", 3, "--seconds", 0, "--max-drop", 1) == 0
    return trained / "pattern.json"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Support images of the classes a to e, one each: a block of ink at its own place on white paper."""
    for k, name in enumerate("abcde"):
        (tmp_path / "support" / name).mkdir(parents=True)
        image = Image.new("L", (40, 40), 255)
        image.paste(0, (8 * k, 0, 8 * k + 8, 40))
        image.save(tmp_path / "support" / name / "1.png")
    return tmp_path / "support"


def one_line_error(capsys, *words: str) -> None:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("lambda-maml: error: "), captured.err
    for word in words:
        assert word in captured.err
    assert not captured.out


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)], ids=["top", *COMMANDS])
def test_help_explains_every_option(capsys, command):
    assert call(*command, "--help") == 0
    text = capsys.readouterr().out
    assert "Usage: lambda-maml" in text
    if not command:
        assert all(f"  {name} " in text for name in COMMANDS)
        return
    for option in cli.cli.commands[command[0]].params:
        if option.param_type_name == "option":
            assert option.help and option.opts[0] in text


def test_no_command_prints_the_help(capsys):
    assert call() == 0
    assert "Begin with" in capsys.readouterr().out


def test_train_writes_a_checkpoint_and_resumes(trained, capsys):
    small = ["--width", 4, "--steps", 2, "--lr", 0.1, "--query", 3, "--val-tasks", 3, "--val-every", 2]
    assert call("train", "--out", trained, "--iterations", 2, *small, "--resume", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iteration"] == 2 and found["best"]["iteration"] == 2 and found["stopped"] == "iterations"
    assert call("train", "--out", trained, "--iterations", 2, *small) == 2
    one_line_error(capsys, "holds an earlier run", "--resume")


def test_select_writes_its_choice_and_a_picture(trained, selected, capsys):
    found = json.loads(selected.read_text())
    assert len(found["candidates"]) == 31 and found["test"]["tasks"] == 3 and found["stock_full"]["time_ms"] > 0
    assert (found["steps"], found["lr"], found["norm"]) == (2, 0.1, "follow")
    assert found["command"] == f"lambda-maml select {trained / 'best.safetensors'} --tasks 3 --seconds 0 --max-drop 1"
    with Image.open(trained / "report.png") as image:
        assert image.format == "PNG"


def test_select_prints_json_alone(trained, tmp_path, capsys):
    xs = torch.zeros(5, 1, 28, 28)
    model, _ = checkpoint.load(trained / "best.safetensors")
    entries = []
    for pattern in [*(f"{k:05b}" for k in range(1, 32)), STOCK]:
        stock = pattern == STOCK
        options: dict[str, Any] = {
            "pattern": "11111" if stock else pattern,
            "shots": 1,
            "steps": 2,
            "norm": "follow",
            "stock": stock,
        }
        seconds = 1e-4 if pattern == "01000" else 1e-3
        stats = {"median": seconds, "q1": seconds, "q3": seconds}
        entries.append({"name": pattern, "extra_info": timing_info(model, xs, **options), "stats": stats})
    (tmp_path / "bench.json").write_text(json.dumps({"benchmarks": entries}))
    choice = ["--tasks", 2, "--max-drop", 1, "--rule", "point", "--json", "--out", tmp_path / "new" / "pattern.json"]
    assert call("select", trained / "best.safetensors", *choice, "--timings", tmp_path / "bench.json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["chosen"]["pattern"] == "01000" and printed["chosen"]["time_ms"] == pytest.approx(0.1)
    assert printed == json.loads((tmp_path / "new" / "pattern.json").read_text())
    (tmp_path / "bench.json").write_text(json.dumps({"benchmarks": entries[1:]}))
    assert call("select", trained / "best.safetensors", *choice, "--timings", tmp_path / "bench.json") == 2
    one_line_error(capsys, "no timing for pattern 00001")


@pytest.mark.usefixtures("one_thread")
def test_select_races_through_steps_and_rates_and_says_its_plan(trained, tmp_path, capsys):
    out = tmp_path / "pattern.json"
    base = ["select", trained / "best.safetensors", "--tasks", 12, "--seconds", 0, "--out", out]
    given = ["--patterns", "ANIL; 00011; MAML,ANIL", "--steps", "1,2", "--rates", "0.1, 0.3", "--max-drop", 0.2]
    assert call(*base, *given, "--search", "race") == 0
    told = capsys.readouterr()
    assert "16 candidates, a race on 12 tasks: about" in told.err and "A race:" in told.out and "quartiles" in told.out
    found = json.loads(out.read_text())
    assert found["steps"] == found["chosen"]["steps"] and found["lr"] == found["chosen"]["lr"]
    assert {row["steps"] for row in found["candidates"]} <= {1, 2}
    assert call("eval", trained / "best.safetensors", "--pattern", out, "--tasks", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == found["steps"]
    assert call("report", out, "--all") == 0
    assert f"{found['steps']} steps, rate {found['lr']:g}" in capsys.readouterr().out
    for statistics in ("batch", "support"):
        assert call(*base, "--patterns", "ANIL", "--statistics", statistics, "--json") == 0
        assert json.loads(capsys.readouterr().out)["statistics"] == statistics


@pytest.mark.usefixtures("one_thread")
def test_select_keeps_to_a_budget_or_says_the_best_there_is(trained, tmp_path, capsys):
    base = ["select", trained / "best.safetensors", "--tasks", 3, "--seconds", 0, "--out", tmp_path / "pattern.json"]
    assert call(*base, "--patterns", "ANIL; 00011", "--max-time-ms", 1e6) == 0
    assert "Allowed: 1e+06 ms." in capsys.readouterr().out
    found = json.loads((tmp_path / "pattern.json").read_text())
    assert found["max_drop"] is None and found["chosen"]["accuracy"] == max(r["accuracy"] for r in found["candidates"])
    assert call("report", tmp_path / "pattern.json") == 0
    capsys.readouterr()
    for given, words in (
        (["--max-time-ms", 1e-6], ["no pattern adapts within 1e-06 ms", "the fastest is", "allow more"]),
        (["--max-time-ms", 5, "--max-drop", 0.1], ["takes the place of an allowed drop"]),
    ):
        assert call(*base, "--patterns", "ANIL", *given) == 2
        told = capsys.readouterr()
        assert all(word in told.err.splitlines()[-1] for word in words)
    assert call(*base, "--steps", "1,x") == 2
    one_line_error(capsys, "--steps", "'x' is not a valid integer range")


def test_eval_takes_bits_and_pattern_json(trained, selected, tmp_path, capsys):
    common = ["--tasks", 4, "--json"]
    assert call("eval", trained / "best.safetensors", "--pattern", "00011", *common) == 0
    by_bits = json.loads(capsys.readouterr().out)
    assert by_bits["pattern"] == "00011" and 0 <= by_bits["accuracy"] <= 1 and by_bits["steps"] == 2
    own, alone = by_bits["statistics"]["batch"], by_bits["statistics"]["support"]
    assert own == {"accuracy": by_bits["accuracy"], "ci95": by_bits["ci95"]} and 0 <= alone["accuracy"] <= 1
    assert alone["drop"] == pytest.approx(own["accuracy"] - alone["accuracy"], abs=1e-9) and alone["drop_ci95"] >= 0
    assert call("eval", trained / "best.safetensors", "--pattern", selected, *common, "--steps", 3) == 0
    by_file = json.loads(capsys.readouterr().out)
    report = json.loads(selected.read_text())
    assert by_file["pattern"] == report["chosen"]["pattern"] and by_file["steps"] == 3
    (tmp_path / "other.json").write_text(json.dumps({**report, "steps": 4, "lr": 0.3, "norm": "never"}))
    assert call("eval", trained / "best.safetensors", "--pattern", tmp_path / "other.json", *common) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["lr"], found["norm"]) == (4, 0.3, "never")
    assert call("eval", trained / "best.safetensors", "--tasks", 1) == 0
    head, together, alone = capsys.readouterr().out.splitlines()
    assert head.startswith("11111 on 1 test tasks") and "query images together" in together
    assert "each image by itself" in alone and "no interval from one task" in alone


def test_adapt_classifies_images_as_the_library_does(trained, selected, pictures, tmp_path, capsys):
    out = tmp_path / "adapted.safetensors"
    args = ["adapt", trained / "best.safetensors", "--support", pictures, "--query", pictures, "--pattern", "11111"]
    assert call(*args, "--steps", 60, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == list("abcde") and [row["class"] for row in found["predictions"]] == list("abcde")
    model, meta = checkpoint.load(out)
    assert meta["adapted"]["classes"] == list("abcde") and meta["adapted"]["steps"] == 60
    ink = torch.zeros(5, 1, 28, 28)
    for k in range(5):
        with Image.open(pictures / "abcde"[k] / "1.png") as image:
            small = image.resize((28, 28), Image.Resampling.LANCZOS)
        ink[k, 0] = 1 - torch.tensor(list(small.tobytes())).view(28, 28) / 255
    with torch.no_grad():
        chances = model(ink).softmax(-1)
    assert [row["probability"] for row in found["predictions"]] == pytest.approx(chances.amax(-1).tolist(), abs=1e-4)
    assert call(*args) == 0
    assert f"{pictures / 'a' / '1.png'}: " in capsys.readouterr().out


def test_a_zero_head_takes_any_number_of_classes(zero_head, pictures, tmp_path, capsys):
    shutil.rmtree(pictures / "e")
    shutil.rmtree(pictures / "b")
    out = tmp_path / "adapted.safetensors"
    assert call("adapt", zero_head, "--support", pictures, "--query", pictures, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == ["a", "c", "d"] and len(found["predictions"]) == 3
    assert call("predict", out, pictures, "--json") == 0
    again = json.loads(capsys.readouterr().out)["predictions"]
    assert [row["class"] for row in again] == [row["class"] for row in found["predictions"]]

    assert call("eval", zero_head, "--ways", 7, "--tasks", 4, "--json") == 0
    model, meta = checkpoint.load(zero_head)
    by_hand = models.conv4(7, 1, 4, 28)
    body = {name: tensor for name, tensor in model.state_dict().items() if "head" not in name}
    by_hand.load_state_dict({**body, "head.weight": torch.zeros(7, 4), "head.bias": torch.zeros(7)})
    tasks = data.sample_tasks(data.load("glyphs", split="test"), 4, ways=7, query=3, seed=TEST_SEED)
    rates = load_rates(zero_head, model, meta, 2)
    assert rates is not None
    want = evaluate(by_hand, tasks, pattern="11111", steps=2, lr=rates)
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(want.mean)

    chosen = tmp_path / "pattern.json"
    args = ["--ways", 3, "--tasks", 3, "--seconds", 0, "--max-drop", 1, "--patterns", "ANIL", "--out", chosen]
    assert call("select", zero_head, *args) == 0
    assert call("eval", zero_head, "--ways", 3, "--tasks", 3, "--pattern", chosen) == 0


def test_a_meta_learned_head_refuses_other_numbers_of_classes(trained, capsys):
    for command in ("eval", "select"):
        assert call(command, trained / "best.safetensors", "--ways", 3) == 2
        one_line_error(capsys, "has 5 classes, not 3", "--zero-head")
    _, meta = checkpoint.load(trained / "best.safetensors", ways=5)
    assert meta["settings"]["ways"] == 5


def test_rates_per_weight_refuse_other_numbers_of_classes(tmp_path, capsys):
    small = ["--width", 4, "--steps", 1, "--query", 2, "--val-tasks", 2, "--val-every", 1, "--iterations", 1]
    assert call("train", "--out", tmp_path / "run", *small, "--zero-head", "--learn-lr", "weight") == 0
    capsys.readouterr()
    assert call("eval", tmp_path / "run" / "best.safetensors", "--ways", 3, "--tasks", 2) == 2
    one_line_error(capsys, "is of another rule", "[5, 4]", "[3, 4]")
    assert call("eval", tmp_path / "run" / "best.safetensors", "--ways", 3, "--tasks", 2, "--lr", 0.1) == 0


def test_adapt_refuses_bad_folders(trained, pictures, tmp_path, capsys):
    out = tmp_path / "adapted.safetensors"
    base = ["adapt", trained / "best.safetensors", "--out", out, "--support"]
    assert call(*base, tmp_path / "nowhere") == 2
    one_line_error(capsys, "nowhere: no such folder")
    (pictures / "f").mkdir()
    assert call(*base, pictures) == 2
    one_line_error(capsys, str(pictures / "f"), "no image in this class folder")
    Image.new("L", (5, 5)).save(pictures / "f" / "1.png")
    assert call(*base, pictures) == 2
    one_line_error(capsys, "6 class folders (a, b, c, d, e, f)", "5 classes")
    (pictures / "f" / "1.png").unlink()
    (pictures / "f").rmdir()
    whole = (pictures / "a" / "1.png").read_bytes()
    (pictures / "a" / "1.png").write_bytes(whole[:60])
    assert call(*base, pictures) == 2
    one_line_error(capsys, str(pictures / "a" / "1.png"), "not a readable image")
    (pictures / "a" / "1.png").write_bytes(whole)
    (tmp_path / "query").mkdir()
    assert call(*base, pictures, "--query", tmp_path / "query") == 2
    one_line_error(capsys, "no image in this folder")
    assert call(*base, pictures, "--pattern", "0011") == 2
    one_line_error(capsys, "0011", "5")
    assert call(*base, pictures, "--lr", 1e30) == 2
    one_line_error(capsys, "1e+30")
    assert not out.exists()


def test_report_reads_a_selection_back(selected, tmp_path, capsys):
    assert call("report", selected, "--out", tmp_path / "again.png", "--all") == 0
    text = capsys.readouterr().out
    assert "MAML 11111, stock" in text and "10101" in text and (tmp_path / "again.png").is_file()
    assert call("report", selected, "--out", tmp_path / "again.png", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pattern"] == json.loads(selected.read_text())["chosen"]["pattern"]
    (tmp_path / "pattern.json").write_text('{"schema": 1}')
    assert call("report", tmp_path / "pattern.json") == 2
    one_line_error(capsys, "pattern.json: network is missing")
    assert not (tmp_path / "report.png").exists()


def test_info_lists_the_backends(capsys):
    assert call("info", "--json") == 0
    assert "reference" in json.loads(capsys.readouterr().out)["backends"]
    assert call("info") == 0
    assert "backend reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, words",
    [
        (["eval", "nowhere.safetensors"], ["nowhere.safetensors", "no such checkpoint"]),
        (["eval", "CHECKPOINT", "--pattern", "01x01"], ["01x01"]),
        (["eval", "CHECKPOINT", "--pattern", "00000"], ["00000"]),
        (["eval", "CHECKPOINT", "--device", "cuda:99"], ["cuda:99"]),
        (["eval", "CHECKPOINT", "--device", "abacus"], ["abacus", "expected cpu"]),
        (["eval", "CHECKPOINT", "--dataset", "nonesuch"], ["nonesuch", "glyphs"]),
        (["eval", "CHECKPOINT", "--dataset", "omniglot"], ["omniglot", "root"]),
        (["eval"], ["Missing argument"]),
        (["evla"], ["No such command 'evla'"]),
        (["train", "--out", "OUT", "--ways", "1"], ["ways is 1"]),
        (["train", "--out", "OUT", "--pattern", "111"], ["111"]),
        (["train", "--out", "OUT", "--shots", "30"], ["30"]),
        (["train", "--out", "OUT", "--resume"], ["no run to resume"]),
        (["select", "CHECKPOINT", "--tasks", "0"], ["tasks"]),
        (["select", "CHECKPOINT", "--max-drop", "2"], ["max-drop"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line(trained, tmp_path, capsys, args, words):
    places = {"CHECKPOINT": trained / "best.safetensors", "OUT": tmp_path / "out"}
    assert call(*(places.get(arg, arg) for arg in args)) == 2
    one_line_error(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LAMBDA_MAML_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        call("eval", "nowhere.safetensors")


@pytest.mark.usefixtures("one_thread")
def test_demo_writes_all_that_it_promises(tmp_path, capsys, monkeypatch):
    tiny = {**cli_demo.DEMO["settings"], "steps": 1, "query": 2, "val_tasks": 2, "val_every": 2}
    small = {"width": 4, "settings": tiny, "iterations": 2, "select_tasks": 3, "test_tasks": 3, "timing_seconds": 0.0}
    monkeypatch.setattr(cli_demo, "DEMO", {**cli_demo.DEMO, **small})
    for _ in range(2):  # a second demo in the same folder starts afresh
        assert call("demo", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert "MAML 11111, stock" in text and "x faster" in text and "3 test tasks" in text
    files = ["best.json", "best.safetensors", "last.safetensors", "metrics.jsonl", "pattern.json", "report.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files


def test_a_demo_refuses_the_folder_of_another_run_at_once(trained, capsys):
    before = {path: path.read_bytes() for path in trained.iterdir()}
    assert call("demo", "--out", trained) == 2
    one_line_error(capsys, str(trained / "last.safetensors"), "holds another run", "--out")
    assert before == {path: path.read_bytes() for path in trained.iterdir()}


def test_the_command_line_loads_nothing_heavy_before_it_needs_it():
    heavy = ("matplotlib", "rich", "PIL", "fontTools")
    code = f"import sys, lambda_maml.cli; print([m for m in {heavy} if m in sys.modules])"
    assert fresh(code).strip() == "[]"


def test_images_of_another_size_do_not_fit(trained, capsys, monkeypatch):
    small = data.load("glyphs", split="test")
    cut = data.ImageSet("cut", "test", small.images[:, :20, :20], small.counts, small.class_names)
    monkeypatch.setattr(data, "load", lambda *args, **options: cut)
    assert call("eval", trained / "best.safetensors") == 2
    one_line_error(capsys, "cut has images [1, 20, 20]", "[1, 28, 28]")
