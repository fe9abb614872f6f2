"""`lambda-maml methods`, and the options by which a run is trained with one of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from .console import json_option, options, print_json

if TYPE_CHECKING:
    from torch import nn

    from .methods.catalogue import Method
    from .settings import Settings

__all__ = ["OPTIONS", "chooser_of", "inner_of", "method_options", "methods", "parts_for"]

OPTIONS = ("methods", "inner", "task_weights", "task_source", "outer_loss")
"""The names of what `method_options` give a command."""

_METAVAR = "NAME[:KEY=VALUE,...]"
method_options = options(
    click.option(
        "--method", "methods", multiple=True, metavar=_METAVAR,
        help="A related method, as `lambda-maml methods` lists them, such as alfa or lslr:lr=0.1; may be repeated.",
    ),
    click.option("--inner", metavar=_METAVAR, help="One in the place of the inner loop or step, such as ridge_head."),
    click.option("--task-weights", metavar=_METAVAR, help="One for the weights of the tasks' losses, such as spsa."),
    click.option("--task-source", metavar=_METAVAR, help="One for which tasks are drawn, such as pool:size=25."),
    click.option("--outer-loss", metavar=_METAVAR, help="One for the outer loss, such as steepest:alpha=0.01."),
)  # fmt: skip
_PLACES = {
    "inner": ("rule", "solver", "estimator", "selector"), "task_weights": ("weights",), "task_source": ("source",),
    "outer_loss": ("objective",),
}  # fmt: skip


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """The related methods: name, paper, place, what each needs, and whether it stays on the fast chain."""
    from .methods import METHODS

    rows = [
        {"name": m.name, "paper": m.paper, "place": m.place, "needs": m.needs, "chain": m.chain, "does": m.does}
        for m in METHODS.values()
    ]
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "place", "needs", "on the fast chain", "paper")
    for row in rows:
        table.add_row(*(row[key] for key in ("name", "place", "needs", "chain", "paper")))
    Console(width=120).print(table)


def parts_for(asked: Mapping[str, Any], settings: Settings, train_set: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """What makes, for a network, the `rule` and the `parts` of a run that these options ask for.

    Raises:
        ValueError: a name is unknown or stands in another place, or a setting is not KEY=VALUE.
    """
    chosen: dict[str, tuple[Method, dict[str, Any]]] = {}
    given = [("method", text) for text in asked["methods"]] + [(k, asked[k]) for k in _PLACES if asked[k]]
    for option, text in given:
        method, values = _asked(text, option)
        if method.place == "chooser":
            raise ValueError(f"{method.name} chooses a pattern for a task: give it to adapt or eval, --pattern {text}")
        if method.place in chosen:
            other = chosen[method.place][0].name
            raise ValueError(f"{other} and {method.name} are both a {method.place}: take one of them")
        chosen[method.place] = method, values
    if {"estimator", "selector"} & chosen.keys() and "solver" in chosen and chosen["solver"][0].name != "descend":
        raise ValueError(f"{chosen['solver'][0].name} has no steps for an estimator: take one of them")
    if settings.test_steps is not None and {"estimator", "selector", "solver"} & chosen.keys():
        raise ValueError("--test-steps: a solver has its own number of steps, in training and after: leave it out")
    return lambda model: _made(chosen, settings, train_set, model) if chosen else {}


def _asked(text: str, option: str) -> tuple[Method, dict[str, Any]]:
    """A method and its settings from NAME:KEY=VALUE,...; values are JSON, or else text."""
    from .methods.catalogue import named

    name, _, rest = text.partition(":")
    method = named(name)
    if option != "method" and method.place not in _PLACES[option]:
        raise ValueError(f"--{option.replace('_', '-')} {name}: it is a {method.place}: give it as --method {text}")
    values: dict[str, Any] = {}
    for item in filter(None, re.split(r",(?=\w+=)", rest)):
        key, is_one, value = item.partition("=")
        if not is_one:
            raise ValueError(f"{text}: expected {_METAVAR}, such as lslr:lr=0.1")
        try:
            values[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            values[key.strip()] = float(value) if value in ("inf", "-inf") else value
    return method, values


def _made(
    chosen: Mapping[str, tuple[Method, dict[str, Any]]], settings: Settings, train_set: Any, model: nn.Module
) -> dict[str, Any]:  # fmt: skip
    import torch

    from .inner.rules import sgd
    from .methods import backward, descend, query_loss, top_gradient
    from .parts import Parts
    from .patterns import Pattern

    pattern = Pattern.of(model, settings.pattern or "MAML")
    moved = [n for step in range(len(pattern.stages)) for n in pattern.parameters(model, settings.norm, step)]
    run: dict[str, Any] = {
        "names": list(dict.fromkeys(moved)), "steps": settings.steps, "lr": settings.lr, "norm": settings.norm,
        "pattern": pattern, "model": model, "meta_batch": settings.meta_batch, "ways": settings.ways,
        "rule": sgd(settings.lr), "channels": _channels(model, pattern),
    }  # fmt: skip
    if hasattr(train_set, "counts"):
        channels, height, width = train_set.image_shape
        run |= {
            "classes": len(train_set.counts),
            "sample": torch.zeros(settings.ways * settings.shots, channels, height, width),
        }

    def make(place: str) -> Any:
        return _filled(*chosen[place], run) if place in chosen else None

    source = make("source")
    run |= {"pool": getattr(source, "size", None)}
    rule = make("rule")
    run |= {"rule": rule or run["rule"]}
    selector = make("selector")
    run |= {"select": selector or top_gradient()}
    estimator = make("estimator")
    if estimator is None and selector is not None:
        estimator = backward(selector)
    plain = descend(run["rule"], settings.steps, estimator=estimator)
    run |= {"solver": plain}
    solver = plain if estimator is not None else make("solver")
    objective = make("objective")
    if objective is not None and chosen["objective"][0].name in ("bootstrap", "sparse_rates"):
        objective = query_loss() + objective
    weights = make("weights")
    found: dict[str, Any] = {} if solver is not None or rule is None else {"rule": rule}
    if any(part is not None for part in (solver, objective, weights, source)):
        found["parts"] = Parts(solver=solver, objective=objective, weights=weights, source=source)
    return found


def _channels(model: nn.Module, pattern: Any) -> dict[str, int]:
    """What the layers that move hand on, but for the last one."""
    from .network import layers_of, module_of

    moved = [layer for layer in layers_of(model) if set(layer.weights) & set(pattern.parameters(model))]
    return {x.name: w.shape[0] for x in moved[:-1] if (w := getattr(module_of(model, x), "weight", None)) is not None}


def _filled(method: Method, given: dict[str, Any], run: Mapping[str, Any]) -> Any:
    """The part, with what the run knows in the places of what was not given."""
    known = {key: run[name] for key, name in method.fill.items() if run.get(name) is not None and key not in given}
    try:
        return method.make(**known, **given)
    except TypeError as error:
        told = str(error).replace(f"{method.make.__name__}.__init__() ", "")
        raise ValueError(f"{method.name}: {told} ({_METAVAR})") from error


def chooser_of(text: str) -> Any:
    """The chooser of patterns that a text such as fisher:budget=0.3 names; None for anything else."""
    if not text.startswith("fisher"):
        return None
    method, given = _asked(text, "method")
    return _filled(method, given, {})


def inner_of(checkpoint: Any, model: nn.Module, meta: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """The checkpoint's rule or solver, as `adapt` takes them; its own number of steps may be another one.

    Raises:
        ValueError: it cannot be made, or it has no steps or another number of them.
    """
    from .methods import descend
    from .saved_parts import load_inner

    found = load_inner(checkpoint, model, meta)
    solver = found.get("solver")
    if solver is None or steps is None:
        return found
    if type(solver) is not descend:
        raise ValueError(f"--steps {steps}: the checkpoint's solver {solver!r} has its own steps: leave --steps out")
    return {"solver": descend(solver.rule, steps, solver.estimator, solver.penalty)}
