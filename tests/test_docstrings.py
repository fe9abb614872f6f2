"""The docstrings of both packages: their examples run, and conv_block is what its docstring defines."""

from __future__ import annotations

import doctest
import importlib
import inspect
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BLOCKS, EXACT, BlockCase
from PIL import Image

import lambda_maml
from lambda_kernels import backends, convert, functional, layers
from lambda_maml import LambdaMAML, Learner, Pattern, data, methods, models, places, racing, rules
from lambda_maml.ahead import Ahead
from lambda_maml.average import Average
from lambda_maml.choice import Budget, Limit, candidates_of
from lambda_maml.evaluate import evaluate, name_of, worded
from lambda_maml.goal import Goal
from lambda_maml.learned_rates import learned_rule
from lambda_maml.lock import locked
from lambda_maml.maml import TaskLearner
from lambda_maml.memory import measure_memory
from lambda_maml.parts import Parts
from lambda_maml.per_task import Costs, PerTask, entropy, kinds_of, values_of
from lambda_maml.processes import joined, launched
from lambda_maml.progress import spoken, time_left
from lambda_maml.ranks import Lost, Ranks, Stopped
from lambda_maml.schedule import importances
from lambda_maml.search import Counted, cheaper, suffixes_and_stages
from lambda_maml.settings import Settings, stages
from lambda_maml.stats import t_tail
from lambda_maml.timing import busy, is_tie
from lambda_maml.train import train
from lambda_maml.trials import Trial, counts_of, rates_of, trials_of

MODULES = (functional, layers, backends, importlib.import_module(convert.__module__))
METHODS = (
    *(LambdaMAML.clone, TaskLearner.adapt, TaskLearner.gradients, TaskLearner.update, TaskLearner.clone),
    *(Learner.parameters_dict, Learner.to_module, Pattern.parse, Pattern.all, Pattern.of, Pattern.describe),
    *(Pattern.parameters, Pattern.cost),
)
PUBLIC = (
    *(value for name in lambda_maml.__all__ if not isinstance(value := getattr(lambda_maml, name), ModuleType)),
    *(rules.Rule, rules.sgd, rules.momentum, rules.adam, rules.rmsprop, rules.weight_decay, rules.clip),
    *(TaskLearner, data.load, data.sample_tasks, data.Augment, data.ImageSet.fingerprint, models.conv4, models.build),
    *(data.ImageSet, data.from_folder, data.from_dataset, data.divide, data.divided),
    *(models.resnet12, models.create, models.config_of, models.image_shape, evaluate, worded, name_of),
    *(candidates_of, Goal, time_left),
    *(racing.looks, racing.chance, racing.fastest, racing.most_accurate, racing.Allowance.covers, measure_memory),
    *(Budget.holds, Limit, Trial, trials_of, counts_of, rates_of, Counted, suffixes_and_stages, cheaper),
    *(is_tie, busy, spoken, t_tail, Costs.mean, PerTask, PerTask.of, entropy, kinds_of, values_of),
    *(train, Settings, stages, importances, learned_rule, Ahead, Average),
    *(joined, launched, locked, Lost, Stopped, Ranks, Ranks.share, Ranks.first, Ranks.first_then_all, Ranks.total),
    *(getattr(methods, name) for name in methods.__all__),
    *(places.Objective, places.Problem, places.Turn, Parts),
    *(Ranks.mean_gradient, Ranks.agreed, Ranks.start_alike, Ranks.check_alike, Ranks.own_random_numbers, Ranks.is_heir),
)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_examples_run(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    done = doctest.testmod(module)
    assert done.attempted >= 3 and not done.failed


def test_every_public_name_has_an_example() -> None:
    for module in MODULES[:2]:
        for name in module.__all__:
            assert ">>>" in (getattr(module, name).__doc__ or ""), f"{module.__name__}.{name}"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples of lambda_maml speak of: a network, and two tasks of 5 ways and 1 shot."""
    tasks = data.sample_tasks(data.load("glyphs"), 2, ways=5, shots=1)
    public = {name: getattr(lambda_maml, name) for name in lambda_maml.__all__}
    public |= {name: getattr(methods, name) for name in methods.__all__} | {"Turn": places.Turn, "methods": methods}
    return {**public, "torch": torch, "nn": torch.nn, "loss_fn": F.cross_entropy, "tasks": tasks}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is :DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("of", [*PUBLIC, *METHODS], ids=lambda of: of.__qualname__)
def test_the_examples_of_the_adapter_run(
    of: Any, names: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if of is data.from_folder:
        for k in range(20):
            (tmp_path / "pictures" / f"{k}").mkdir(parents=True)
            Image.new("L", (9, 9)).save(tmp_path / "pictures" / f"{k}" / "1.png")
        monkeypatch.chdir(tmp_path)
    model = models.conv4(ways=5, in_channels=1, width=8, image_size=28)
    own = dict(zip(("xs", "ys", "xq", "yq"), names["tasks"][0]))
    found = {
        **names,
        **own,
        "folder": tmp_path,
        "model": model,
        "task": LambdaMAML(model, lr=0.03, pattern="00011").clone(),
    }
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    globs = {**vars(inspect.getmodule(of)), **found}
    for example in doctest.DocTestFinder(recurse=False).find(getattr(of, "__func__", of), of.__qualname__, globs=globs):
        runner.run(example)
    assert runner.tries and not runner.failures, capsys.readouterr().out


@pytest.mark.parametrize("case", BLOCKS, ids=[case.name for case in BLOCKS])
def test_conv_block_is_what_its_docstring_defines(case: BlockCase) -> None:
    text = functional.conv_block.__doc__ or ""
    definition = text.partition("by definition\n\n")[2].partition("\n\n")[0]
    assert definition.count("\n") == 4
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    operands: dict[str, Any] = {
        "x": draw(case.images, case.inputs, *case.size),
        "weight": draw(case.width, case.inputs // case.groups, 3, 3),
        **{name: draw(case.width) for name in ("bias", "gamma", "beta")},
    }
    constants: dict[str, Any] = {name: getattr(case, name) for name in ("stride", "padding", "groups", "pool")}
    constants |= {"eps": 1e-3, "dilation": 1}
    names: dict[str, Any] = {"torch": torch, "F": F, **operands, **constants}
    exec(textwrap.dedent(definition), names)
    got = functional.conv_block(**operands, **constants)
    torch.testing.assert_close(got, names["y"], **EXACT)
