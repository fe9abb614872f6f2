"""Supervised pretraining beside plain PyTorch; its files, faults and resume; training that begins with a checkpoint."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import TRAIN, VAL, assert_same_bits, image_set, network, run, small
from torch import nn

from lambda_kernels import to_torch
from lambda_kernels.agreement import within
from lambda_maml import checkpoint, data, evaluate, models
from lambda_maml.cli import run as command
from lambda_maml.data import Augment
from lambda_maml.data.imageset import with_rotations
from lambda_maml.pretrain import PRETRAINED, STATE, Pretrained, Pretraining, pretrain, start_from

COLOUR = image_set("train", channels=3)
SHORT = Pretraining(epochs=3, batch=20, lr=0.05)


def pretrained(out: Path, model: nn.Module | None = None, settings: Pretraining = SHORT, **more: Any) -> Pretrained:
    return pretrain(model or network(), TRAIN, out=out, settings=settings, **more)


def interrupt(done: int, total: int, what: str) -> None:
    if done == 6:  # of 12 updates in 3 epochs of SHORT: in the second one
        os.kill(os.getpid(), signal.SIGTERM)


def test_all_layers_but_the_last_learn_as_in_plain_pytorch(tmp_path: Path) -> None:
    model = network().double()
    twin = to_torch(model)
    torch.manual_seed(SHORT.seed)
    twin.set_submodule("head", nn.Linear(4, TRAIN.num_classes).double())
    steps = torch.optim.SGD(twin.parameters(), momentum=0.9, weight_decay=SHORT.weight_decay, nesterov=True, lr=1.0)
    each = len(TRAIN) // SHORT.batch
    right = 0
    for epoch in range(SHORT.epochs):
        words = np.random.PCG64(np.random.SeedSequence(SHORT.seed, spawn_key=(epoch, 3))).random_raw(len(TRAIN))
        right = 0
        for k, index in enumerate(np.array_split(np.argsort(words, kind="stable"), each)):
            share = (epoch * each + k) / (each * SHORT.epochs)
            steps.param_groups[0]["lr"] = SHORT.lr * 0.5 * (1 + np.cos(np.pi * share))
            x, y = TRAIN.tensors(index).double(), torch.from_numpy(TRAIN.targets[index])
            logits = twin(x)
            right += int((logits.argmax(1) == y).sum())
            steps.zero_grad()
            F.cross_entropy(logits, y).backward()
            steps.step()

    found = pretrained(tmp_path, model)
    assert [entry.epoch for entry in found.history] == [1, 2, 3] and found.history[-1].accuracy == right / len(TRAIN)
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name.startswith("head."):
            assert not got.any()
        else:
            torch.testing.assert_close(got, want, **within(torch.float64, "steps"), msg=name)


def test_what_is_learned_serves_classes_that_were_not_seen(tmp_path: Path) -> None:
    tasks = data.sample_tasks(VAL, 40, ways=3, shots=1, query=4, seed=5)
    model = network(width=8)

    def accuracy() -> float:
        return evaluate.evaluate(model, tasks, pattern="00001", steps=5, lr=0.1).mean

    before = accuracy()
    found = pretrained(tmp_path, model, replace(SHORT, epochs=12))
    assert found.history[-1].accuracy > 0.9 > found.history[0].accuracy
    assert accuracy() > before + 0.1


def test_the_images_of_an_update_are_changed_by_its_own_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def noted(self: Augment, pixels: Any, draws: Any) -> Any:
        seen.append(draws)
        return pixels.astype(np.float32)

    monkeypatch.setattr(Augment, "__call__", noted)
    torch.manual_seed(0)
    pretrain(models.conv4(3, 3, 4, 16), COLOUR, out=tmp_path, settings=replace(SHORT, epochs=2, flip=True))
    assert len(seen) == 2 * (len(COLOUR) // SHORT.batch) and sum(map(len, seen)) == 2 * len(COLOUR)
    assert len({draws.tobytes() for draws in seen}) == len(seen)
    with pytest.raises(ValueError, match="colour images of 3 channels, these have 1"):
        pretrained(tmp_path / "grey", settings=replace(SHORT, jitter=0.1))


def test_rotations_are_pretraining_on_the_turned_classes(tmp_path: Path) -> None:
    turned, own = with_rotations(TRAIN), replace(SHORT, epochs=1)
    one, two = network(), network()
    found = pretrained(tmp_path / "asked", one, replace(own, rotations=True))
    assert found.classes == turned.num_classes == 4 * TRAIN.num_classes
    pretrain(two, turned, out=tmp_path / "given", settings=own)
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    plain = network()
    pretrained(tmp_path / "plain", plain, own)
    assert not torch.equal(plain.get_parameter("block1.conv.weight"), one.get_parameter("block1.conv.weight"))
    with pytest.raises(ValueError, match=f"{turned.name} train has the rotations of its classes already"):
        pretrain(two, turned, out=tmp_path / "twice", settings=replace(own, rotations=True))


@pytest.mark.usefixtures("one_thread")
def test_a_state_from_before_a_setting_is_one_without_it(tmp_path: Path) -> None:
    pretrained(tmp_path, progress=interrupt)
    tensors, meta = checkpoint.read_tensors(tmp_path / STATE)
    del meta["run"]["pretraining"]["rotations"]
    checkpoint.write_tensors(tmp_path / STATE, tensors, meta)
    with pytest.raises(ValueError, match=r"has pretraining \{.*'rotations': False.*this one \{.*'rotations': True"):
        pretrained(tmp_path, settings=replace(SHORT, rotations=True), resume=True)
    checkpoint.write_tensors(tmp_path / STATE, tensors, {**meta, "run": {**meta["run"], "pretraining": 5}})
    with pytest.raises(ValueError, match=STATE):
        pretrained(tmp_path, resume=True)
    checkpoint.write_tensors(tmp_path / STATE, tensors, meta)
    assert pretrained(tmp_path, resume=True).stopped == "epochs"


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_pretraining_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, parts = network(), network()
    pretrained(tmp_path / "whole", whole)

    before = [p.clone() for p in parts.parameters()]
    first = pretrained(tmp_path / "parts", parts, progress=interrupt)
    assert (first.stopped, len(first.history)) == ("SIGTERM", 1)
    assert all(map(torch.equal, parts.parameters(), before))
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [STATE]
    with pytest.raises(ValueError, match=r"holds a pretraining: resume it \(--resume\)"):
        pretrained(tmp_path / "parts", network())
    with pytest.raises(ValueError, match=r"has pretraining \{.*'lr': 0.05.*this one \{.*'lr': 0.1"):
        pretrained(tmp_path / "parts", network(), replace(SHORT, lr=0.1), resume=True)
    again = pretrained(tmp_path / "parts", network(seed=1), resume=True)
    assert [entry[:3] for entry in again.history] == [entry[:3] for entry in pretrained_history(tmp_path / "whole")]
    one, two = (checkpoint.read_tensors(tmp_path / name / PRETRAINED)[0] for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one) and one.keys() == two.keys()
    assert not (tmp_path / "parts" / STATE).exists()
    with pytest.raises(ValueError, match="the pretraining is done"):
        pretrained(tmp_path / "parts", resume=True)
    with pytest.raises(ValueError, match="holds a pretraining: choose another folder"):
        pretrained(tmp_path / "parts")


def pretrained_history(folder: Path) -> list[Any]:
    return pretrained(folder, overwrite=True).history


def test_an_interrupted_overwrite_leaves_nothing_of_the_earlier_one(tmp_path: Path) -> None:
    """Training would begin with it, and say so of this one."""
    pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("of a user's own")
    assert pretrained(tmp_path, overwrite=True, progress=interrupt).stopped == "SIGTERM"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["notes.txt", STATE]
    with pytest.raises(FileNotFoundError):
        start_from(tmp_path / PRETRAINED, network())
    assert len(pretrained(tmp_path, resume=True).history) == SHORT.epochs and (tmp_path / PRETRAINED).is_file()


def test_bad_input_of_pretrain_is_named(tmp_path: Path) -> None:
    for wrong, words in (
        ({"epochs": 0}, "epochs is 0"), ({"batch": 1}, "batch is 1"), ({"lr": 0.0}, "lr is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"), ({"jitter": 2.0}, "jitter is 2.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Pretraining(**wrong)
    with pytest.raises(FloatingPointError, match=r"pretraining diverged: the loss is .* lower the rate \(1e\+30\)"):
        pretrained(tmp_path / "far", settings=replace(SHORT, lr=1e30))
    headless = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="Sequential ends in Conv2d 2, expected a linear layer"):
        pretrained(tmp_path / "headless", headless)
    assert not (tmp_path / "headless").exists()


def test_start_from_takes_all_weights_that_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = network()
    pretrained(tmp_path, source)
    path = tmp_path / PRETRAINED
    same, more = network(seed=1), network(ways=5, seed=1)
    head = more.get_parameter("head.weight").clone()
    assert start_from(path, same) == start_from(path, more, TRAIN)
    assert all(map(torch.equal, same.parameters(), source.parameters()))
    last = "block4.conv.weight"
    assert torch.equal(more.get_parameter("head.weight"), head)
    assert torch.equal(more.get_parameter(last), source.get_parameter(last))
    assert caplog.text == ""
    other = data.ImageSet("dark", "train", TRAIN.images, TRAIN.counts, TRAIN.class_names, (0.1,), (0.2,))
    start_from(path, more, other)
    assert "its pixels have mean [0.5], those of dark [0.1]" in caplog.text
    with pytest.raises(ValueError, match=r"block1.conv.weight is \[4, 1, 3, 3\] in the file, \[8, 1, 3, 3\]"):
        start_from(path, network(width=8))
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        start_from(tmp_path / "none.safetensors", same)


@pytest.mark.usefixtures("one_thread")
def test_a_run_begins_with_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    pretrained(tmp_path / "pre")
    path, settings = tmp_path / "pre" / PRETRAINED, small()
    loaded = network(seed=2)
    about = start_from(path, loaded)
    run(tmp_path / "loaded", 5, settings, loaded)
    run(tmp_path / "started", 5, settings, network(seed=3), start=path)
    assert_same_bits(tmp_path / "loaded", tmp_path / "started")
    assert json.loads((tmp_path / "started" / "best.json").read_text())["start"] == about
    assert "start" not in json.loads((tmp_path / "loaded" / "best.json").read_text())

    run(tmp_path / "parts", 2, settings, network(seed=3), start=path)
    with pytest.raises(ValueError, match=r"has start sha256 \w+, this one \w+: give the same"):
        run(tmp_path / "parts", 5, settings, start=tmp_path / "loaded" / "best.safetensors", resume=True)
    run(tmp_path / "parts", 5, settings, network(seed=3), resume=True)  # the checkpoint may be gone
    assert_same_bits(tmp_path / "parts", tmp_path / "started")
    assert json.loads((tmp_path / "parts" / "best.json").read_text())["start"] == about


def test_pretrain_and_train_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ant", "bee", "cat", "dog", "eel", "fox", "gnu"):
        save_pictures(tmp_path / "pictures" / name)
    pictures = ["--dataset", "folder", "--root", str(tmp_path / "pictures"), "--image-size", "16", "--width", "4"]
    pre = [*pictures, "--out", str(tmp_path / "pre"), "--epochs", "2", "--batch", "6"]
    assert command(["pretrain", *pre, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["checkpoint"] == str(tmp_path / "pre" / PRETRAINED) and told["last"]["epoch"] == 2
    episode = ["--ways", "2", "--query", "2", "--val-tasks", "2", "--iterations", "1", "--shares", "0.4", "0.3", "0.3"]
    start = ["--start-from", told["checkpoint"], "--out", str(tmp_path / "run")]
    assert command(["train", *pictures, *episode, *start]) == 0
    assert "start" in json.loads((tmp_path / "run" / "best.json").read_text())
    assert "was trained on 1 of the validation classes, gnu among them" in caplog.text
    assert command(["pretrain", *pre]) == 2
    assert "the folder holds a pretraining: choose another folder" in capsys.readouterr().err
    assert (
        command(["train", *pictures, *episode, "--start-from", str(tmp_path / "no"), "--out", str(tmp_path / "x")]) == 2
    )
    assert "no such checkpoint file" in capsys.readouterr().err


def save_pictures(folder: Path, count: int = 4) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(len(folder.name))
    for k in range(count):
        Image.fromarray(random.integers(0, 256, (16, 16)).astype(np.uint8)).save(folder / f"{k}.png")
