"""`--config FILE.toml`: which value holds, and what is said of a file that does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from lambda_maml import cli, cli_config


def call(*args: Any) -> int:
    return cli.run([str(arg) for arg in args])


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the commands are called with, in place of what they do."""
    found: dict[str, Any] = {}
    for command in cli.cli.commands.values():
        monkeypatch.setattr(command, "callback", cli_config._or_printed(lambda **options: found.update(options)))
    return found


FILE = """
[train]
out = "~/runs/a"
dataset = "omniglot"
steps = 3
lr = 1
flip = true
batched = false
invert = false
shares = [0.5, 0.25, 0.25]
network = "my.nets:deep"
network-args = ['widths=[8,16]', "depth=3"]
learn-lr = "layer"
minutes = 2.5

[select]
max-drop = 0.02
relative = true
"""


def test_options_come_from_the_file_and_the_command_line_wins(tmp_path, given):
    (tmp_path / "a.toml").write_text(FILE)
    assert call("train", "--config", tmp_path / "a.toml", "--steps", 7, "--batched", "--lr", 0.5) == 0
    assert (given["steps"], given["lr"], given["batched"]) == (7, 0.5, True)
    assert (given["out"], given["dataset"]) == (Path.home() / "runs/a", "omniglot")
    assert given["flip"] is True and given["invert"] is False and given["shares"] == (0.5, 0.25, 0.25)
    assert given["network_args"] == ("widths=[8,16]", "depth=3") and given["learn_lr"] == "layer"
    assert given["minutes"] == 2.5 and given["shots"] == 1 and given["width"] is None
    given.clear()
    assert call("select", "--config", tmp_path / "a.toml", "a.safetensors") == 0
    assert (given["max_drop"], given["relative"], given["rule"]) == (0.02, True, "bound")
    given.clear()
    assert call("eval", "a.safetensors", "--config", tmp_path / "a.toml") == 0
    assert given["tasks"] == 400 and given["dataset"] is None


def test_numbers_are_what_the_command_line_makes_of_them(tmp_path, given):
    (tmp_path / "a.toml").write_text(FILE)
    assert call("train", "--config", tmp_path / "a.toml") == 0
    by_file = dict(given)
    given.clear()
    options = ["--out", "~/runs/a", "--dataset", "omniglot", "--steps", 3, "--lr", 1, "--flip", "--one-by-one"]
    options += ["--no-invert", "--shares", 0.5, 0.25, 0.25, "--network", "my.nets:deep", "--learn-lr", "layer"]
    options += ["--network-args", "widths=[8,16]", "--network-args", "depth=3", "--minutes", 2.5]
    assert call("train", *options) == 0
    assert by_file == given and all(type(by_file[name]) is type(given[name]) for name in given)


def test_what_holds_is_printed_as_a_file_that_gives_the_same(tmp_path, given, capsys):
    (tmp_path / "a.toml").write_text(FILE)
    options = ["--steps", 7, "--root", 'a "b"\\c\x7fé', "--meta-lr", 1e-6]
    assert call("train", "--config", tmp_path / "a.toml", *options, "--print-config") == 0
    assert not given
    printed = capsys.readouterr().out
    assert printed.startswith("[train]\n") and "steps = 7\n" in printed and "\nwidth =" not in printed
    (tmp_path / "b.toml").write_text(printed, encoding="utf-8")
    assert call("train", "--config", tmp_path / "a.toml", *options) == 0
    before = dict(given)
    given.clear()
    assert call("train", "--config", tmp_path / "b.toml") == 0
    assert given == before


@pytest.mark.parametrize("name", cli.cli.commands)
def test_every_option_of_every_command_has_its_key_and_its_type(name):
    command = cli.cli.commands[name]
    assert {"config", "print_config"} <= {param.name for param in command.params}
    for option in command.params:
        if isinstance(option, click.Option) and option.name not in cli_config._OWN:
            sound = [v for v in (True, 1, 0.5, "a", ["a"], [0.5, 0.2, 0.3]) if cli_config._is(option, v)]
            assert sound and cli_config._expected(option), option.name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[train]\nstep = 3", "train.step: train has no such option (did you mean steps?): --help lists"),
        ("[train]\nmeta_batch = 3", "train.meta_batch: train has no such option (did you mean meta-batch?)"),
        ("[train]\none-by-one = true", "train.one-by-one: write batched = false"),
        ("[train]\nconfig = 'b.toml'", "train.config: train has no such option"),
        ("[train]\nhelp = true", "train.help: train has no such option"),
        ("[select]\ncheckpoint = 'a'", "select.checkpoint: it is no option: give CHECKPOINT on the command line"),
        ("[trian]\nsteps = 3", "trian: no command has this name (did you mean train?): tables are demo, pretrain"),
        ("steps = 3", "steps: no command has this name"),
        ("train = 3", "train is 3, expected a table: write [train] above its options"),
        ("[train]\nsteps = 3.0", "train.steps is 3.0, expected a whole number from 1 to 1e+09"),
        ("[train]\nsteps = '3'", "train.steps is '3', expected a whole number"),
        ("[train]\nsteps = true", "train.steps is True, expected a whole number"),
        ("[train]\nsteps = 0", "train.steps is 0: 0 is not in the range 1<=x<=1000000000; expected a whole"),
        ("[train]\nlr = '0.1'", "train.lr is '0.1', expected a number from 0 to 1e+06"),
        ("[train]\nlr = nan", "train.lr is nan: "),
        ("[train]\nminutes = 0", "expected a number above 0"),
        ("[train]\nflip = 1", "train.flip is 1, expected true or false"),
        ("[train]\nlearn-lr = 'all'", 'expected one of "one", "layer", "step"'),
        ("[train]\nshares = [0.5, 0.5]", "train.shares is [0.5, 0.5], expected a list of 3 numbers"),
        ("[train]\nnetwork-args = 'depth=3'", "train.network-args is 'depth=3', expected a list of text in quotes"),
        ("[train]\nout = ''", "train.out is '': a path is empty"),
        ("[train]\nout = 3", "train.out is 3, expected text in quotes"),
        ("[train]\nout = 1979-05-27", "train.out is datetime.date(1979, 5, 27), expected text in quotes"),
        ("[select]\nmax-drop = 2", "select.max-drop is 2: "),
        ("[train]\nsteps = 3\nsteps = 4", "not a TOML file ("),
        ("[train]\ndataset = omniglot", "not a TOML file ("),
        ("[train]\nsteps = " + "[" * 20000, "not a TOML file ("),
        ("[train]\nsteps = " + "9" * 5000, "not a TOML file ("),
        ("# " + "x" * (1 << 20), "options take at most 1048576"),
        (b"\xff", "not a TOML file (byte 0 is not UTF-8)"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_told_in_one_line(tmp_path, given, capsys, content, words):
    """The other commands' tables, too: a file is right or wrong as a whole."""
    path = tmp_path / "a.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (["train", "--out", tmp_path], ["select", "a.safetensors"]):
        assert call(*command, "--config", path) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"lambda-maml: error: {path}: ") and captured.err.count("\n") == 1
        assert words in captured.err and not captured.out and not given


def test_what_is_no_file_is_told(tmp_path, given, capsys):
    assert call("info", "--config", tmp_path) == 2
    assert f"{tmp_path}: is no file: --config takes a TOML file" in capsys.readouterr().err
    assert call("info", "--config", tmp_path / "none.toml") == 2
    assert "No such file" in capsys.readouterr().err and not given


def test_a_python_without_toml_names_the_extra(tmp_path, given, capsys, monkeypatch):
    (tmp_path / "a.toml").write_text("")
    monkeypatch.setattr(cli_config, "sys", SimpleNamespace(version_info=(3, 10)))
    monkeypatch.setitem(sys.modules, "tomli", None)
    assert call("info", "--config", tmp_path / "a.toml") == 2
    assert "--config below Python 3.11 needs tomli, which is not installed: pip install 'lambda-kernels[cli]'" in (
        capsys.readouterr().err
    )
