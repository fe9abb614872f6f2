"""What commands take of a checkpoint, of the pattern beside it, and of the options that say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .cli_data import SETS, folder_options, root_option
from .cli_methods import chooser_of, inner_of
from .cli_types import COUNT, PLACE, RATE, expanded
from .console import device_of, options

if TYPE_CHECKING:
    from .per_task import PerTask

__all__ = [
    "checkpoint_argument", "data_options", "episode_of", "in_json", "inner_loop", "inner_options", "load",
    "pattern_of", "pattern_option", "read_run", "ways_option",
]  # fmt: skip

data_options = options(
    click.option("--dataset", help=f"{SETS}  [default: the checkpoint's]"), root_option, folder_options
)
inner_options = options(
    click.option("--steps", type=click.IntRange(1), help="Gradient steps of adaptation.  [default: the checkpoint's]"),
    click.option("--lr", type=RATE, help="Rate of these steps.  [default: the checkpoint's]"),
    click.option(
        "--norm", type=click.Choice(["follow", "never"]),
        help="Do a layer's norm weights follow its bit, or never adapt.  [default: the checkpoint's]",
    ),
)  # fmt: skip
ways_option = click.option(
    "--ways", type=COUNT, help="Classes in a task; others than the checkpoint's after --zero-head alone."
)
checkpoint_argument = click.argument("checkpoint", type=PLACE)
pattern_option = click.option(
    "--pattern", help="Bits such as 00011, a name such as ANIL, or a pattern.json.  [default: all layers]"
)


def load(path: Path, device: str, ways: int | None = None) -> tuple[Any, dict[str, Any]]:
    from . import checkpoint

    where = device_of(device)
    model, meta = checkpoint.load(path, ways=ways)
    if "adapted" in meta:
        raise ValueError(
            f"{path}: is adapted to {', '.join(meta['adapted']['classes'])} already: predict and export take it; give "
            "the checkpoint of training"
        )
    checkpoint.check_trained(path, meta)
    return model.to(where), meta


def episode_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: meta["settings"][key] for key in ("ways", "shots", "query")}


def pattern_of(model: Any, text: str | None) -> tuple[Any, dict[str, Any]]:
    """Bits, or a chooser of patterns, and, if they come from a pattern.json, that file's content."""
    from .pattern_json import read_selection
    from .patterns import Pattern

    if text is None:
        return str(Pattern.of(model, "MAML")), {}
    if text.endswith(".json"):
        found = read_selection(expanded(text))
        return str(Pattern.parse(found["chosen"]["pattern"])), found
    return chooser_of(text) or str(Pattern.of(model, text)), {}


def _rule_of(report: Mapping[str, Any], steps: int | None, lr: float | None, norm: str | None) -> PerTask | None:
    """The rule per task of a pattern.json; None where it has none, ValueError beside an inner loop of another kind."""
    from .per_task import PerTask

    rule = PerTask.of(report)
    asked = [f"--{name}" for name, value in (("steps", steps), ("lr", lr), ("norm", norm)) if value is not None]
    if rule is not None and asked:
        raise ValueError(
            f"pattern.json has a rule per task, which was fitted with its own steps, rate and norm: leave "
            f"{' and '.join(asked)} out, or give --pattern {report['chosen']['pattern']}"
        )
    return rule


def inner_loop(
    checkpoint: Path, model: Any, meta: Mapping[str, Any], report: Mapping[str, Any], steps: int | None,
    lr: float | None, norm: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Steps, rates and norm of the inner loop: as asked, else as in the pattern.json, else as in the checkpoint, whose
    learned rates are used as they are."""
    import torch

    from .inner.rules import sgd
    from .learned_rates import load_rates
    from .select import rates_in_json

    settings = meta["settings"]
    default = {
        "steps": settings["test_steps"] or settings["steps"], "norm": settings["norm"],
        **{key: report[key] for key in ("steps", "norm") if key in report},
    }  # fmt: skip
    asked = {"steps": steps, "norm": norm}
    inner: dict[str, Any] = {key: default[key] if value is None else value for key, value in asked.items()}
    if lr is not None:
        return {**inner, "lr": lr}
    if own := inner_of(checkpoint, model, meta, steps):
        return {**inner, **own}
    learned = load_rates(checkpoint, model, meta, inner["steps"])
    if "inner_rule" in report and not isinstance(learned, dict):
        raise ValueError(
            f"the pattern was chosen for the inner rule {report['inner_rule']}, which the command line does not build: "
            "give --lr for plain gradient descent, or call lambda_maml.adapt(..., rule=...)"
        )
    if isinstance(learned, dict):
        return {**inner, "rule": sgd(learned)}
    rates = report.get("lr", settings["lr"])
    if learned is not None and ("lr" not in report or isinstance(rates, list) or rates == rates_in_json(learned, None)):
        return {**inner, "lr": learned}
    return {**inner, "lr": torch.tensor(rates) if isinstance(rates, list) else rates}


class Run(NamedTuple):
    """A checkpoint and how it is adapted."""

    model: Any
    meta: dict[str, Any]
    pattern: Any  # bits, or a chooser
    rule: PerTask | None
    inner: dict[str, Any]


def read_run(
    checkpoint: Path, device: str, pattern: str | None, steps: int | None, lr: float | None, norm: str | None,
    ways: int | None = None,
) -> Run:  # fmt: skip
    """A checkpoint on a device, with the pattern, the rule per task and the inner loop that the options ask for."""
    model, meta = load(checkpoint, device, ways)
    bits, report = pattern_of(model, pattern)
    rule = _rule_of(report, steps, lr, norm)
    return Run(model, meta, bits, rule, inner_loop(checkpoint, model, meta, report, steps, lr, norm))


def in_json(inner: Mapping[str, Any]) -> dict[str, Any]:
    """The inner loop's settings as they are printed and saved."""
    from .select import rates_in_json

    rule = inner.get("solver", inner.get("rule"))
    told = {} if rule is None else {"inner_rule": " ".join(repr(rule).split())}
    steps = getattr(inner.get("solver"), "steps", None) or inner["steps"]
    return {"steps": steps, "lr": rates_in_json(inner.get("lr", 0.0), rule), "norm": inner["norm"], **told}
