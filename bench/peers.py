"""Who is compared: this project, stock PyTorch by hand, and the packages higher, TorchOpt and learn2learn.

Each package is used as in its own examples, in first order, on the stock network with frozen parameters that need no
gradient. None of them can leave a frozen prefix out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from by_hand import LR, NORM, Compiled, Functional, Stock
from harness import PlainLoop, Problem, Skip
from torch import Tensor

from lambda_maml import Learner, Pattern, adapt

SOURCE = "LEARN2LEARN_SRC"


class Contender(Protocol):
    """A call adapts once; `reset`, off the clock, makes it ready for the next one; `result` are all parameters after
    one adaptation."""

    def __call__(self) -> object: ...
    def reset(self) -> None: ...
    def result(self) -> list[Tensor]: ...


Make = Callable[[Problem, Pattern, int], Contender]  # for so many steps


class Ours:
    def __init__(self, problem: Problem, pattern: Pattern, steps: int) -> None:
        self.adapt = functools.partial(adapt, *problem, pattern=pattern, steps=steps, lr=LR, norm=NORM)

    def reset(self) -> None:
        pass

    def __call__(self) -> Learner:
        return self.adapt()

    def result(self) -> list[Tensor]:
        return [p.detach() for p in self().parameters_dict().values()]


class StockFull(PlainLoop):
    """The yardstick of all benchmarks."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int) -> None:
        super().__init__(problem, pattern, steps, LR, NORM)


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Skip(f"not installed: {error}") from None


class Peer(Stock):
    """Starts at the network's own parameters and leaves them as they are."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int) -> None:
        super().__init__(problem, pattern, steps, prefix=False)
        self.final: list[Tensor] = []

    def reset(self) -> None:
        pass

    def result(self) -> list[Tensor]:
        self()
        return [p.detach().clone() for p in self.final]


class Higher(Peer):
    def __init__(self, problem: Problem, pattern: Pattern, steps: int) -> None:
        super().__init__(problem, pattern, steps)
        self.innerloop = package("higher").innerloop_ctx
        self.optimizer = torch.optim.SGD(list(self.free.values()), lr=LR)

    @torch.enable_grad()
    def __call__(self) -> None:
        with self.innerloop(self.network, self.optimizer, track_higher_grads=False) as (network, optimizer):
            for _ in range(self.steps):
                optimizer.step(F.cross_entropy(network(self.xs), self.ys))
        self.final = list(network.parameters())


class TorchOpt(Peer):
    """The functional optimiser: `torchopt.MetaSGD` always records the graph of second order."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int) -> None:
        super().__init__(problem, pattern, steps)
        self.torchopt = package("torchopt")
        self.optimizer = self.torchopt.sgd(lr=LR)

    @torch.enable_grad()
    def __call__(self) -> None:
        weights = self.free
        state = self.optimizer.init(weights)
        for _ in range(self.steps):
            logits = torch.func.functional_call(self.rest, weights, (self.xs,))
            grads = torch.autograd.grad(F.cross_entropy(logits, self.ys), tuple(weights.values()))
            with torch.no_grad():
                updates, state = self.optimizer.update(dict(zip(weights, grads)), state, inplace=False)
                weights = self.torchopt.apply_updates(weights, updates, inplace=False)
            weights = {name: w.requires_grad_() for name, w in weights.items()}
        self.final = [weights.get(name, p) for name, p in self.rest.named_parameters()]


class Learn2Learn(Peer):
    """From the checkout that LEARN2LEARN_SRC names: its releases do not build beside a torch of today."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int) -> None:
        super().__init__(problem, pattern, steps)
        self.maml = learn2learn_maml()(self.network, lr=LR, first_order=True, allow_nograd=True)

    @torch.enable_grad()
    def __call__(self) -> None:
        task = self.maml.clone()
        for _ in range(self.steps):
            task.adapt(F.cross_entropy(task(self.xs), self.ys))
        self.final = list(task.parameters())


def learn2learn_folder() -> Path:
    if not os.environ.get(SOURCE):
        raise Skip(f"{SOURCE} names no checkout")
    folder = Path(os.environ[SOURCE]) / "learn2learn"
    if not folder.is_dir():
        raise Skip(f"{SOURCE} names no folder that holds learn2learn")
    return folder


def learn2learn_maml() -> Any:
    """The class MAML of the checkout."""
    folder = learn2learn_folder()
    if "learn2learn" not in sys.modules:
        # Its __init__ imports image sets and gym environments, which need packages that MAML does not.
        bare = types.ModuleType("learn2learn")
        bare.__path__ = [str(folder)]
        sys.modules["learn2learn"] = bare
    return package("learn2learn.algorithms.maml").MAML


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in ("higher", "torchopt", "optree"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with contextlib.suppress(Skip, OSError):
        text = (learn2learn_folder() / "_version.py").read_text(encoding="utf-8")
        found["learn2learn"] = text.partition("=")[2].strip().strip("'\"")
    return found


FULL, LAST = "11111", "00011"
BY_HAND: dict[str, dict[str, Make]] = {
    FULL: {
        "ours": Ours,
        "stock_full": StockFull,
        "stock_channels_last": functools.partial(Stock, prefix=False, layout=torch.channels_last),
    },
    LAST: {
        "ours": Ours,
        "stock_masked": functools.partial(Stock, prefix=False),
        "stock_prefix": functools.partial(Stock, prefix=True),
        "stock_channels_last": functools.partial(Stock, prefix=False, layout=torch.channels_last),
        "stock_prefix_channels_last": functools.partial(Stock, prefix=True, layout=torch.channels_last),
    },
}
PACKAGES: dict[str, Make] = {
    "func": Functional,
    "compile": Compiled,
    "higher": Higher,
    "torchopt": TorchOpt,
    "learn2learn": Learn2Learn,
}
