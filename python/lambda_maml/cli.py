"""The command line, `lambda-maml`: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_config import with_config
from .cli_data import SETS, checkpoint_sets, folder_options, root_option
from .cli_export import export, line, predict, predictions
from .cli_methods import chooser_of, inner_of, methods
from .cli_report import report, tables
from .cli_select import CHOICE, choice_options, compared, wanted
from .cli_train import exit_if_stopped, say_if_stopped, train, train_with_progress
from .cli_types import COUNT, PLACE, RATE, SEED, expanded
from .console import bar, device_of, device_option, json_option, options, print_json, say

if TYPE_CHECKING:
    import torch

    from .per_task import PerTask

DEMO: dict[str, Any] = {
    "dataset": "glyphs",
    "width": 32,
    "settings": {
        "ways": 5, "shots": 1, "query": 5, "steps": 1, "test_steps": 10, "lr": 0.4, "meta_lr": 2e-3, "meta_batch": 8,
        "val_tasks": 100, "val_every": 200,
    },
    "iterations": 600,
    "train_minutes": 1.2,
    "query": 15,
    "select_tasks": 150,
    "test_tasks": 200,
    "timing_seconds": 8.0,
    "max_drop": 0.01,
}  # fmt: skip
"""All that the demo's time and result depend on; the whole of it stays within 3 minutes on 2 cores."""

SELECT_SEED, TEST_SEED = 1000, 2000
"""Seeds of the tasks to choose on and to report on, apart from those of training and of its validation."""


class Group(click.Group):
    """Commands in the order in which they are defined, each with `--config`."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(with_config(cmd, self), name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.group(cls=Group, context_settings=HELP, invoke_without_command=True)
@click.version_option(package_name="lambda-kernels", prog_name="lambda-maml")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Adapt few-shot networks fast: find out which layers a MAML-trained network must update.

    A pattern has one bit per layer, input first: 0 frozen, 1 updated while adapting to a new task. 11111 is MAML, 00001
    is ANIL, and these names may stand for them. Begin with `lambda-maml demo`; then `train` a network, `select` a
    pattern, and `adapt` to your own images.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


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
checkpoint_argument = click.argument("checkpoint", type=PLACE)


@cli.command()
@click.option("--out", type=PLACE, default=Path("runs/demo"), help="Folder for the results.")
@click.option("--seed", type=SEED, default=0, help="Seed of the network and of the tasks.")
@json_option
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Train, choose a pattern and show what it gains, in three minutes.

    Meta-trains a small network on glyphs (characters of many scripts, which come with the package), evaluates and times
    all 31 patterns, and compares the chosen one with MAML in stock PyTorch on tasks that it was not chosen on. In the
    folder: best.safetensors, pattern.json and report.png. A demo of the same seed that lies there is made again;
    another run is left alone.
    """
    from . import data
    from .lock import locked
    from .run_state import held_by, is_same_run
    from .select import select_pattern
    from .train import BEST, LAST, Settings

    start = time.perf_counter()
    settings = Settings(**DEMO["settings"], seed=seed)
    network = {"network": "conv4", "width": DEMO["width"]}
    again = is_same_run(out / LAST, settings, network, DEMO["dataset"], DEMO["iterations"])
    if not again and (held := held_by(out)):
        raise ValueError(f"{held}: the folder holds another run: choose another one (--out)")
    say("preparing glyphs")
    train_set, val_set, test_set = (data.load(DEMO["dataset"], split=split) for split in ("train", "val", "test"))
    result = train_with_progress(
        train_set, val_set, out, settings, network, iterations=DEMO["iterations"], minutes=DEMO["train_minutes"],
        overwrite=again,
    )  # fmt: skip
    say_if_stopped(result, "the demo begins anew")
    exit_if_stopped(result)
    model, _ = _load(out / BEST, "cpu")
    episode = {"ways": settings.ways, "shots": settings.shots, "query": DEMO["query"]}
    with bar("selecting") as progress:
        chosen = select_pattern(
            model,
            data.sample_tasks(val_set, DEMO["select_tasks"], seed=SELECT_SEED + seed, **episode),
            test_tasks=data.sample_tasks(test_set, DEMO["test_tasks"], seed=TEST_SEED + seed, **episode),
            steps=settings.evaluation_steps, lr=settings.lr, norm=settings.norm, max_drop=DEMO["max_drop"],
            seconds=DEMO["timing_seconds"], progress=progress,
        )  # fmt: skip
    with locked(out, "demo"):
        _publish({**chosen.to_dict(), "command": _command()}, chosen.warnings, out / "pattern.json", as_json)
    say(f"the whole demo took {time.perf_counter() - start:.0f} s")


cli.add_command(train)
cli.add_command(methods)


@cli.command()
@checkpoint_argument
@data_options
@click.option(
    "--tasks", type=COUNT, default=200, help="Validation tasks to choose on; as many test tasks to report on."
)
@choice_options
@click.option("--seed", type=SEED, default=0, help="Seed of the tasks.")
@click.option("--out", type=PLACE, help="Where to write.  [default: pattern.json by the checkpoint]")
@device_option
@json_option
def select(
    checkpoint: Path, dataset: str | None, root: Path | None, tasks: int, steps: list[int] | None, lr: float | None,
    rates: list[float] | None, norm: str | None, seed: int, out: Path | None, device: str, as_json: bool, **others: Any,
) -> None:  # fmt: skip
    """Choose the fastest pattern whose accuracy is good enough.

    Evaluates patterns on the same validation tasks, measures how long each one adapts, and takes the fastest one within
    --max-drop of the full pattern, or the most accurate one within a budget. Patterns are judged with the norm
    statistics that --statistics says; the choice is reported on test tasks by both: of all query images of a task
    together, and of each image by itself (the support set's), as adapt and export have it. Writes pattern.json and,
    beside it, report.png (NAME.png by NAME.json).

    One that is ended before goes on from what it had evaluated, if it is started again in the same way.

    Several processes divide the tasks: torchrun --nproc-per-node 4 -m lambda_maml select ...
    """
    from . import data
    from .files import try_folder
    from .lock import locked
    from .processes import joined
    from .report import picture_of
    from .select import select_pattern

    path = out or checkpoint.parent / "pattern.json"
    _check_out(path)
    with joined(device) as ranks, ExitStack() as held:
        model, meta = _load(checkpoint, str(ranks.device or device))
        if ranks.rank == 0:
            held.enter_context(locked(path.parent, "select"))
            try_folder(path, picture_of(path))
        ranks.check_alike(model.state_dict())
        rate = rates[0] if lr is None and rates else lr
        inner = compared(_inner(checkpoint, model, meta, {}, max(steps) if steps else None, rate, norm), steps, rates)
        choice = {key: others.pop(key) for key in CHOICE}
        val_set, test_set = ranks.first_then_all(
            lambda: checkpoint_sets(meta, dataset, root, ("val", "test"), others, ranks)
        )
        episode = _episode(meta)
        val_tasks = data.sample_tasks(val_set, tasks, seed=SELECT_SEED + seed, **episode)
        test_tasks = data.sample_tasks(test_set, tasks, seed=TEST_SEED + seed, **episode)
        with bar("selecting", ranks) as progress:
            chosen = select_pattern(
                model, val_tasks, test_tasks=test_tasks, **inner, **wanted(choice), progress=progress, plan=say,
                resume=path.with_suffix(".evaluated.json"), ranks=ranks,
            )  # fmt: skip
        if ranks.rank == 0:
            _publish({**chosen.to_dict(), "command": _command()}, chosen.warnings, path, as_json)


@cli.command("eval")
@checkpoint_argument
@click.option("--pattern", help="Bits such as 00011, a name such as ANIL, or a pattern.json.  [default: all layers]")
@data_options
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", help="Part of the set.")
@click.option("--tasks", type=COUNT, default=400, help="Number of tasks.")
@inner_options
@click.option("--seed", type=SEED, default=0, help="Seed of the tasks.")
@device_option
@json_option
def evaluate_command(
    checkpoint: Path, pattern: str | None, dataset: str | None, root: Path | None, split: str, tasks: int,
    steps: int | None, lr: float | None, norm: str | None, seed: int, device: str, as_json: bool,
    **pictures: int | None,
) -> None:  # fmt: skip
    """Accuracy of a checkpoint on new tasks, under a pattern.

    Said twice: with the norms' statistics taken from all query images of a task together ("batch"), as published
    results have it, and from the support set ("support"), so that each image is classified by itself, as adapt, predict
    and export do. What the latter costs is a mean of differences on the same tasks, with its 95% interval.
    """
    from . import data
    from .adapt import STATISTICS
    from .evaluate import evaluate
    from .ranks import ALONE
    from .statistics import StatisticsError
    from .stats import mean_ci95

    model, meta = _load(checkpoint, device)
    bits, report = _pattern(model, pattern)
    rule = _rule(report, steps, lr, norm)
    inner = _inner(checkpoint, model, meta, report, steps, lr, norm)
    (images,) = checkpoint_sets(meta, dataset, root, (split,), pictures, ALONE)
    episodes = data.sample_tasks(images, tasks, seed=TEST_SEED + seed, **_episode(meta))
    found: dict[str, dict[str, Any]] = {}
    scores: dict[str, torch.Tensor] = {}
    together = getattr(inner.get("solver"), "linearises", False)  # its predictions are those of no network
    again = None if rule is None else rule.decide(model, episodes, **inner)
    for statistics in STATISTICS[:1] if together else STATISTICS:
        try:
            with bar(f"evaluating, statistics of the {statistics}") as progress:
                given = {"statistics": statistics, **inner, "progress": progress}
                if rule is None or again is None:
                    mean = evaluate(model, episodes, pattern=bits, **given)
                else:
                    mean = rule.evaluate(model, episodes, again, **given)
        except StatisticsError as error:
            found[statistics] = {"accuracy": None, "ci95": None, "refused": str(error)}
            continue
        found[statistics] = {"accuracy": mean.mean, "ci95": mean.ci95 if tasks > 1 else None}
        scores[statistics] = mean.scores
    if "support" in scores:
        drop, ci95 = mean_ci95(scores["batch"] - scores["support"])
        found["support"] |= {"drop": drop, "drop_ci95": ci95 if tasks > 1 else None}
    if as_json:
        told = {**_in_json(inner), "statistics": found}
        used: dict[str, Any] = {"pattern": str(bits)}
        if rule is not None and again is not None:
            own_rows = {"cheap": str(rule.cheap), "dear": str(rule.dear), "share": float(again.double().mean())}
            used = {"pattern": None, "per_task": own_rows}
        print_json({**used, "split": split, "tasks": tasks, **found["batch"], **told})
        return
    own = inner.get("solver", inner.get("rule"))
    told_of = f"{inner['steps']} steps" if own is None else " ".join(repr(own).split())
    if rule is not None and again is not None:
        bits, told_of = f"{rule},", f"{again.double().mean():.0%} of them anew, {told_of}"
    click.echo(f"{bits} on {tasks} {split} tasks, {told_of}:")
    for statistics, how in (("batch", "query images together"), ("support", "each image by itself"))[: len(found)]:
        row = found[statistics]
        if "refused" in row:
            click.echo(f"  no figure, {how} (statistics of the {statistics}): {row['refused']}")
            continue
        interval = "% (no interval from one task)" if row["ci95"] is None else f"± {100 * row['ci95']:.2f} %"
        cost = (
            f", costs {100 * row['drop']:.2f} ± {100 * row['drop_ci95']:.2f} points"
            if row.get("drop_ci95") is not None
            else ""
        )
        click.echo(f"  {100 * row['accuracy']:.2f} {interval}, {how} (statistics of the {statistics}){cost}")


@cli.command()
@checkpoint_argument
@click.option("--support", type=PLACE, required=True, help="Folder with one sub-folder of images per class.")
@click.option("--query", type=PLACE, help="Folder of images to classify, or one sub-folder a class.")
@click.option("--pattern", help="Bits such as 00011, a name such as ANIL, or a pattern.json.  [default: all layers]")
@inner_options
@click.option(
    "--invert/--no-invert", default=None,
    help="Dark ink on light paper becomes high.  [default: as in training, else --invert for one-channel networks]",
)  # fmt: skip
@click.option(
    "--statistics", type=click.Choice(["support", "batch"]), default="support",
    help="Classify each image by itself, by the support set's norm statistics, or all together, by their own.",
)  # fmt: skip
@click.option("--out", type=PLACE, help="Write the adapted network here (.safetensors), for predict and export.")
@device_option
@json_option
def adapt(
    checkpoint: Path, support: Path, query: Path | None, pattern: str | None, steps: int | None, lr: float | None,
    norm: str | None, invert: bool | None, statistics: str, out: Path | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Adapt a checkpoint to your own images, and classify others."""
    import torch

    from . import checkpoint as files
    from .adapt import adapt as adapt_model
    from .files import try_folder
    from .images import class_folders, inverted, query_files, read_images
    from .learned_rates import load_learned_rule
    from .models import image_shape
    from .statistics import StatisticsError

    if out is not None:
        if out.suffix != ".safetensors":
            raise ValueError(f"--out {out}: the name ends in .safetensors")
        if statistics == "batch":
            raise ValueError(
                f"--out {out}: an adapted checkpoint holds the support set's statistics, by which predict classifies "
                "each image: leave out --statistics batch, or --out"
            )
        if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
            raise ValueError(f"--out {out}: this is the checkpoint itself: name another file")
        try_folder(out)
    model, meta = _load(checkpoint, device)
    network = meta["network"]
    bits, report = _pattern(model, pattern)
    rule = _rule(report, steps, lr, norm)
    inner = _inner(checkpoint, model, meta, report, steps, lr, norm)
    classes = class_folders(support)
    ways = network.get("ways", meta["settings"]["ways"])
    if len(classes) != ways:
        found = f"{len(classes)} class folders ({', '.join(classes)})" if classes else "no class folder"
        raise ValueError(f"{support}: {found}, but the network has {ways} classes")
    shape = image_shape(network)
    dark = inverted(shape, meta["dataset"]) if invert is None else invert

    def read(paths: list[Path]) -> torch.Tensor:
        return read_images(paths, shape, meta["dataset"], invert=dark).to(device)

    labels = [index for index, paths in enumerate(classes.values()) for _ in paths]
    xs, ys = read([path for paths in classes.values() for path in paths]), torch.tensor(labels, device=device)
    queries = [] if query is None else query_files(query)
    xq = read(queries) if queries else None

    if rule is not None and xq is None:
        say(f"a rule per task needs the images to classify (--query): adapting by the fixed choice, {bits}")
        rule = None
    try:
        if rule is None:
            learner = adapt_model(model, xs, ys, pattern=bits, statistics=statistics, **inner)
        else:
            learner, trial, _ = rule.adapt(model, xs, ys, xq, statistics=statistics, **inner)
            bits, inner = str(trial.pattern), rule.inner(trial, inner)
    except StatisticsError as error:
        raise ValueError(f"{error}; --statistics batch classifies query images together, by their own") from error
    if statistics == "support":
        learner.eval()  # as predict has it: without dropout
    classified = []
    if xq is not None:
        with torch.no_grad():
            classified = predictions(queries, list(classes), learner(xq).cpu())
    told = _in_json(inner)
    if out is not None:
        adapted = {"pattern": str(bits), **told, "classes": list(classes), "images": list(shape), "invert": dark}
        rates = load_learned_rule(checkpoint, model, meta)
        trained = {key: value for key, value in meta.items() if key != "parts"}
        files.save(out, model, {**trained, "adapted": adapted}, rates, learner.state_dict())
        say(f"wrote {out}")
    if as_json:
        print_json(
            {
                "pattern": str(bits),
                "statistics": statistics,
                **told,
                "classes": list(classes),
                "support": len(labels),
                "predictions": classified,
            }
        )
        return
    click.echo(f"adapted under {bits} to {len(labels)} support images of {', '.join(classes)}")
    for prediction in classified:
        click.echo(line(prediction))


cli.add_command(predict)
cli.add_command(export)


cli.add_command(report)


@cli.command()
@click.argument("checkpoint", type=PLACE, required=False)
@click.option("--pattern", help="Bits, a name, or a pattern.json, to explain.  [default: all layers]")
@inner_options
@device_option
@json_option
def info(
    checkpoint: Path | None, pattern: str | None, steps: int | None, lr: float | None, norm: str | None, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Versions, devices, and which kernels can run here.

    With a CHECKPOINT also which way an adaptation of its network takes, and why it takes no faster one.
    """
    from lambda_kernels import info as kernels

    found = kernels.collect()
    ways = "" if checkpoint is None else _ways(checkpoint, pattern, steps, lr, norm, device)
    if as_json:
        print_json({**found, **({"adaptation": ways.splitlines()} if ways else {})})
    else:
        click.echo(kernels.text(found))
        if ways:
            click.echo(f"\n{ways}")


def _ways(
    checkpoint: Path, pattern: str | None, steps: int | None, lr: float | None, norm: str | None, device: str
) -> str:
    """How the checkpoint's network is adapted to a support set of its own ways and shots."""
    import torch

    from .explain import explain
    from .models import image_shape

    model, meta = _load(checkpoint, device)
    bits, report = _pattern(model, pattern)
    settings = meta["settings"]
    ys = torch.arange(settings["ways"]).repeat_interleave(settings["shots"]).to(device)
    some = next(model.parameters())
    xs = torch.zeros(len(ys), *image_shape(meta["network"]), dtype=some.dtype, device=device)
    return explain(model, xs, ys, pattern=bits, **_inner(checkpoint, model, meta, report, steps, lr, norm))


def _check_out(path: Path) -> None:
    """ValueError where a selection cannot be written to `path`: nothing but a selection is written over."""
    from .pattern_json import read_selection

    if path.suffix != ".json":
        raise ValueError(f"--out {path}: the name ends in .json")
    if path.exists():
        try:
            read_selection(path)
        except ValueError as error:
            raise ValueError(f"--out {path}: it holds something else, name another file ({error})") from error


def _command() -> str:
    """The command line as it was given."""
    return shlex.join(["lambda-maml", *(click.get_current_context().obj or [])])


def _publish(found: dict[str, Any], warnings: list[str], path: Path, as_json: bool) -> None:
    """Print the tables or the JSON, whether or not it can be written; write pattern.json and report.png."""
    from .files import write_json
    from .report import picture_of, plot

    for warning in warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(found)
    else:
        tables(found)
    write_json(path, found)
    picture, drawn = picture_of(path), True
    try:
        plot(found, picture)
    except ModuleNotFoundError as missing:
        say(f"warning: there is no picture: {missing}")
        drawn = False
    if not as_json:
        click.echo(f"wrote {path}{f' and {picture}' if drawn else ''}")


def _load(path: Path, device: str) -> tuple[Any, dict[str, Any]]:
    from . import checkpoint

    where = device_of(device)
    model, meta = checkpoint.load(path)
    if "adapted" in meta:
        raise ValueError(
            f"{path}: is adapted to {', '.join(meta['adapted']['classes'])} already: predict and export take it; give "
            "the checkpoint of training"
        )
    checkpoint.check_trained(path, meta)
    return model.to(where), meta


def _episode(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: meta["settings"][key] for key in ("ways", "shots", "query")}


def _pattern(model: Any, text: str | None) -> tuple[Any, dict[str, Any]]:
    """Bits, or a chooser of patterns, and, if they come from a pattern.json, that file's content."""
    from .pattern_json import read_selection
    from .patterns import Pattern

    if text is None:
        return str(Pattern.of(model, "MAML")), {}
    if text.endswith(".json"):
        found = read_selection(expanded(text))
        return str(Pattern.parse(found["chosen"]["pattern"])), found
    return chooser_of(text) or str(Pattern.of(model, text)), {}


def _rule(report: Mapping[str, Any], steps: int | None, lr: float | None, norm: str | None) -> PerTask | None:
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


def _inner(
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


def _in_json(inner: Mapping[str, Any]) -> dict[str, Any]:
    """The inner loop's settings as they are printed and saved."""
    from .select import rates_in_json

    rule = inner.get("solver", inner.get("rule"))
    told = {} if rule is None else {"inner_rule": " ".join(repr(rule).split())}
    steps = getattr(inner.get("solver"), "steps", None) or inner["steps"]
    return {"steps": steps, "lr": rates_in_json(inner.get("lr", 0.0), rule), "norm": inner["norm"], **told}


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after an error (one line on stderr, whatever the error is),
    130 after Ctrl-C. Of several ranks one says what all have met.

    With LAMBDA_MAML_DEBUG=1 in the environment errors show their traceback.
    """
    debug = os.environ.get("LAMBDA_MAML_DEBUG", "") not in ("", "0")
    try:
        given = sys.argv[1:] if args is None else args
        status = cli.main(given, prog_name="lambda-maml", standalone_mode=False, obj=given)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        message = error.format_message()
    except (click.Abort, KeyboardInterrupt):
        click.echo("lambda-maml: interrupted", err=True)
        return 130
    except Exception as error:
        if debug:
            raise
        if getattr(error, "told", False):  # `ranks.Lost`: another rank says it
            return 2
        message = _told(error)
    click.echo(f"lambda-maml: error: {' '.join(message.split())}", err=True)
    return 2


def _told(error: Exception) -> str:
    """The text of an error; of one that no check foresaw, also its kind."""
    if isinstance(error, MemoryError):
        return f"the memory does not suffice ({error or 'no more could be had'}): take fewer tasks or smaller images"
    if isinstance(error, (ValueError, OSError, ArithmeticError, RuntimeError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (unforeseen: LAMBDA_MAML_DEBUG=1 shows where)"


def main() -> None:
    """Entry point of the console script. Networks of one's own are found in the current folder too, as by python -m."""
    sys.path.append(os.getcwd())
    status = run()
    if status and os.environ.get("RANK"):
        # A collective that another rank left alone would hold this process until its own timeout.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
