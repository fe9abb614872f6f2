"""Meta-training against a plain loop, exact resume, checkpoints, and evaluation."""

from __future__ import annotations

import json
import math
import os
import signal
from typing import Any

import pytest
import torch
from cases import GRADIENT
from safetensors.torch import save_file
from small_runs import TRAIN, VAL, assert_same_bits, network, plain_query_losses, run, small, state
from torch import nn

from lambda_kernels import to_torch
from lambda_maml import checkpoint, data, models
from lambda_maml.evaluate import evaluate
from lambda_maml.files import atomic, read_json, write_json
from lambda_maml.train import BEST, LAST, Settings, meta_gradient


def plain_meta_gradient(
    model: nn.Module, tasks: list[data.Task], settings: Settings, bits: str
) -> dict[str, torch.Tensor]:
    twin = to_torch(model)
    slow = dict(twin.named_parameters())
    losses = [plain_query_losses(twin, slow, t, settings, bits, settings.second_order)[-1] / len(tasks) for t in tasks]
    return dict(zip(slow, torch.autograd.grad(torch.stack(losses).sum(), list(slow.values())), strict=True))


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one-by-one"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second-order", "first-order"])
@pytest.mark.parametrize("bits, norm", [("11111", "follow"), ("11111", "never"), ("01001", "follow")])
def test_meta_gradient_is_that_of_a_plain_loop(bits, norm, second_order, batched):
    model = network().double()
    settings = small(pattern=bits, norm=norm, second_order=second_order)
    tasks = data.sample_tasks(TRAIN, 3, ways=3, shots=2, query=2, seed=4)
    meta_gradient(model, tasks, settings, batched=batched)
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(found, plain_meta_gradient(model, tasks, settings, bits), **GRADIENT)


def test_training_learns(tmp_path):
    settings = small(val_tasks=20, val_every=40, second_order=False)
    tasks = data.sample_tasks(VAL, 20, ways=3, shots=1, query=2, seed=settings.seed)
    before = evaluate(network(8), tasks, pattern="11111", steps=2, lr=0.1).mean
    result = run(tmp_path, 40, settings, network(8))
    assert result.best is not None and result.stopped == "iterations"
    assert result.best.accuracy > before + 0.1
    model, meta = checkpoint.load(tmp_path / BEST)
    found = evaluate(model, tasks, pattern="11111", steps=2, lr=0.1)
    assert found.mean == pytest.approx(result.best.accuracy) == pytest.approx(meta["metrics"]["val_accuracy"])
    assert meta["dataset"] == {"name": "pictures", "mean": [0.5], "std": [0.2]}
    files = ["best.json", "best.safetensors", "last.safetensors", "metrics.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files


@pytest.mark.parametrize("at", [3, 4], ids=["at-a-validation", "between-validations"])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, at):
    def interrupt(done: int, total: int, what: str) -> None:
        if done == at:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    run(tmp_path / "whole", 7)
    first = run(tmp_path / "parts", 7, progress=interrupt)
    assert (first.stopped, first.iteration) == ("interrupt", at)
    assert signal.getsignal(signal.SIGINT) is handler
    second = run(tmp_path / "parts", 7, model=network(seed=9), resume=True)
    assert (second.stopped, second.iteration) == ("iterations", 7)
    assert any(key.endswith("exp_avg_sq") for key in state(tmp_path / "whole")[0])
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    best = [checkpoint.read_tensors(tmp_path / part / BEST)[0] for part in ("whole", "parts")]
    assert all(torch.equal(best[0][key], best[1][key]) for key in best[0])


def test_a_run_of_several_parts_goes_on_from_a_finished_one(tmp_path):
    run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    run(tmp_path / "parts", 6, resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_every_iteration_has_tasks_of_its_own(tmp_path, monkeypatch):
    sample, firsts = data.sample_tasks, []

    def recorded(dataset: data.ImageSet, n: int, **options: Any) -> list[data.Task]:
        if dataset is TRAIN:
            firsts.append((options["first"], n))
        return sample(dataset, n, **options)

    monkeypatch.setattr(data, "sample_tasks", recorded)
    run(tmp_path, 2)
    run(tmp_path, 4, resume=True)
    assert firsts == [(0, 2), (2, 2), (4, 2), (6, 2)]


def test_the_time_limit_validates_and_saves(tmp_path):
    result = run(tmp_path, 1000, minutes=1e-9)
    assert (result.stopped, result.iteration) == ("minutes", 1)
    assert result.history[-1].iteration == 1 and (tmp_path / BEST).is_file() and state(tmp_path)[2] == 1


def test_a_loss_that_is_not_finite_names_the_iteration_and_keeps_the_last_state(tmp_path, monkeypatch):
    run(tmp_path, 3)
    before = (tmp_path / LAST).read_bytes()
    sample = data.sample_tasks

    def poisoned(*args: Any, **options: Any) -> list[data.Task]:
        return [task._replace(xq=task.xq * math.nan) for task in sample(*args, **options)]

    monkeypatch.setattr(data, "sample_tasks", poisoned)
    with pytest.raises(FloatingPointError, match=r"iteration 4 \(inner lr 0.1, meta lr 0.005\)"):
        run(tmp_path, 6, resume=True)
    assert (tmp_path / LAST).read_bytes() == before


def test_an_earlier_run_is_not_overwritten_or_mixed_up(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        run(tmp_path, 2, resume=True)
    run(tmp_path, 1)
    with pytest.raises(ValueError, match="holds an earlier run"):
        run(tmp_path, 2)
    with pytest.raises(ValueError, match="settings lr 0.1, this one 0.2"):
        run(tmp_path, 2, small(lr=0.2), resume=True)
    with pytest.raises(ValueError, match="network width 4, this one 6"):
        run(tmp_path, 2, model=network(6), resume=True)
    assert run(tmp_path, 1, overwrite=True).iteration == 1


@pytest.mark.parametrize(
    "change, words", [({"ways": 1}, "ways is 1"), ({"lr": -1.0}, "lr is -1.0"), ({"steps": 0}, "steps is 0"),
                      ({"norm": "maybe"}, "'maybe'"), ({"meta_lr": math.nan}, "meta_lr is nan")],
)  # fmt: skip
def test_bad_settings(change, words):
    with pytest.raises(ValueError, match=words):
        Settings(**change)


def test_a_checkpoint_comes_back(tmp_path):
    model = network(6)
    checkpoint.save(tmp_path / "a.safetensors", model, {"settings": {"steps": 5}})
    again, meta = checkpoint.load(tmp_path / "a.safetensors")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert meta == read_json(tmp_path / "a.json") == {"settings": {"steps": 5}, "network": models.config_of(model)}


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, network(6), {})
    target = network(4)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    first = next(iter(before))
    with pytest.raises(ValueError, match=rf"{first} is \[6, 1, 3, 3\] in the file, \[4, 1, 3, 3\] in the network"):
        checkpoint.load(path, target)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    with pytest.raises(ValueError, match="weight is no such tensor in the file"):
        checkpoint.load(path, nn.Linear(2, 3))
    tensors, meta = checkpoint.read_tensors(path)
    checkpoint.write_tensors(path, tensors, {"network": {**meta["network"], "ways": 7}})
    with pytest.raises(ValueError, match=r"is \[3, 6\] in the file, \[7, 6\] in the network"):
        checkpoint.load(path)


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        checkpoint.save(tmp_path / "a.pt", network(), {})
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a lambda-maml checkpoint"):
        checkpoint.load(path)
    checkpoint.save(path, network(), {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        checkpoint.load(path)
    run(tmp_path, 1)
    with pytest.raises(ValueError, match="pass best.safetensors"):
        checkpoint.load(tmp_path / LAST)
    with pytest.raises(ValueError, match="no training state"):
        os.replace(tmp_path / BEST, tmp_path / LAST)
        run(tmp_path, 2, resume=True)


def test_what_cannot_be_written_whole_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.json") as part:
        part.write_text("half")
        raise RuntimeError
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_accuracies_are_those_of_single_tasks_in_their_order():
    model = network()
    tasks = data.sample_tasks(VAL, 5, ways=3, shots=1, query=4, seed=1)
    tasks += data.sample_tasks(VAL, 2, ways=3, shots=2, query=3, seed=1)
    options: dict[str, Any] = {"pattern": "00011", "steps": 2, "lr": 0.1}
    together = evaluate(model, tasks, batch=4, **options)
    alone = [evaluate(model, [task], **options).mean for task in tasks]
    assert together.accuracies.tolist() == alone
    assert together.mean == pytest.approx(sum(alone) / 7)
    assert evaluate(model, tasks[:1], **options).ci95 == math.inf
    with pytest.raises(ValueError, match="no tasks"):
        evaluate(model, [], **options)
