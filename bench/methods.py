"""Related methods beside plain MAML: from the same start, for equal meta-iterations, on the same test tasks.

python bench/methods.py --work runs/methods --json bench/results/methods.json --page docs/methods.md

A run that is ended goes on where it was, if it is started again with the same --work. One thread.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import methods_page
import torch
import torch.nn.functional as F
from harness import CONFIGURATIONS
from methods_times import timed
from torch import Tensor, nn

from lambda_kernels import info
from lambda_maml import Pattern, adapt, data, methods, models, rules
from lambda_maml.evaluate import evaluate
from lambda_maml.files import write_json
from lambda_maml.inner import remembered
from lambda_maml.memory import measure_memory
from lambda_maml.methods import backward, descend
from lambda_maml.outer import meta_gradient
from lambda_maml.run_state import LAST
from lambda_maml.stats import mean_ci95
from lambda_maml.train import Parts, Settings, train

LR, STEPS, WAYS, QUERY, BATCH = 0.1, 5, 5, 15, 4
TEST_SEED = 4000
ENVIRONMENT = "environment.json"  # in the folder of a run: what trained it
Given = dict[str, Any]


class Made(NamedTuple):
    """What a row trains with, and how its network adapts afterwards."""

    train: Given = {}
    """`rule` and `parts` of `train`."""
    adapt: Callable[[nn.Module], Given] = lambda model: {}
    """What `adapt` takes in place of a number of steps and a rate."""


class Row(NamedTuple):
    """One line of the table."""

    method: str
    pattern: str
    make: Callable[[nn.Module, Any], Made]
    told: str = ""
    settings: Given = {}
    trained: bool = True
    """Whether it is trained from the start on; else it adapts the network of plain MAML under `plain`."""
    plain: str = ""
    """The pattern of the plain MAML that it is compared with; default: its own."""

    @property
    def name(self) -> str:
        return f"{self.method}-{self.pattern}"

    @property
    def base(self) -> str:
        return f"maml-{self.plain or self.pattern}"


def names(model: nn.Module, pattern: str) -> list[str]:
    return list(Pattern(pattern).parameters(model))


def by_rule(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module, Any], Made]:
    def made(model: nn.Module, images: Any) -> Made:
        rule = make(model)
        return Made({"rule": rule}, lambda _: {"rule": rule})

    return made


def by_parts(make: Callable[[nn.Module], Parts]) -> Callable[[nn.Module, Any], Made]:
    def made(model: nn.Module, images: Any) -> Made:
        parts = make(model)
        return Made({"parts": parts}, lambda _: {} if parts.solver is None else {"solver": parts.solver})

    return made


def plain(model: nn.Module, images: Any) -> Made:
    return Made()


def sparse(model: nn.Module, images: Any) -> Made:
    rule = methods.lslr(names(model, "11111"), STEPS, LR)
    xs = torch.zeros(WAYS, *images.image_shape)
    parts = Parts(objective=methods.query_loss() + methods.sparse_rates(rule, model, xs, weight=0.05))

    def schedule(model: nn.Module) -> Given:
        return {"rule": rule, "pattern": methods.schedule_of(rule, model, 0.02)}

    return Made({"rule": rule, "parts": parts}, schedule)


def memory_of(version: int) -> Callable[[nn.Module], Parts]:
    def made(model: nn.Module) -> Parts:
        given: Given = {"tasks": 25, "beta": 0.3, "version": version, "batch": BATCH if version == 2 else None}
        solver = methods.remembering(descend(rules.sgd(LR), STEPS), model, "00011", **given)
        return Parts(solver=solver, source=methods.pool(25))

    return made


ROWS = [
    *(Row("maml", pattern, plain) for pattern in ("11111", "00011")),
    Row("maml", "00001", lambda m, i: Made({}, lambda _: {"steps": 10}), "10 steps in adapting"),
    Row("alfa", "11111", by_rule(lambda m: methods.alfa(names(m, "11111"), STEPS, LR))),
    Row("alfa", "00011", by_rule(lambda m: methods.alfa(names(m, "00011"), STEPS, LR))),
    Row("lslr", "11111", by_rule(lambda m: methods.lslr(names(m, "11111"), STEPS, LR))),
    Row("lslr", "00011", by_rule(lambda m: methods.lslr(names(m, "00011"), STEPS, LR))),
    Row(
        "ridge_head", "00001", by_parts(lambda m: Parts(solver=methods.ridge_head(1.0, learned=True, scale=10.0))),
        "lam and scale learned, from 1 and 10",
    ),
    Row("ntk", "00001", by_parts(lambda m: Parts(solver=methods.ntk(time=10.0))), "time 10"),
    Row("ntk", "00011", by_parts(lambda m: Parts(solver=methods.ntk(time=10.0))), "time 10"),
    Row(
        "forward_gradient", "00001",
        by_parts(lambda m: Parts(solver=descend(rules.sgd(LR), STEPS, methods.forward_gradient(8, at="activities")))),
        "8 directions at the activities, first order", {"second_order": False},
    ),
    Row("remembering", "00011", by_parts(memory_of(1)), "version 1, 25 tasks, beta 0.3"),
    Row("remembering-2", "00011", by_parts(memory_of(2)), "version 2, 25 tasks, beta 0.3"),
    Row("spsa", "00011", by_parts(lambda m: Parts(weights=methods.spsa(BATCH)))),
    Row("spsa_track", "00011", by_parts(lambda m: Parts(weights=methods.spsa_track(BATCH)))),
    Row("uncertainty", "00011", by_parts(lambda m: Parts(weights=methods.uncertainty(BATCH)))),
    Row("prioritised", "00011", by_parts(lambda m: Parts(source=methods.prioritised(64))), "64 tasks, half of a batch"),
    Row("covering", "00011", lambda m, i: Made({"parts": Parts(source=methods.covering(len(i.counts), WAYS))})),
    Row("steepest", "11111", by_parts(lambda m: Parts(objective=methods.steepest(0.01))), "alpha 0.01"),
    Row("sparse_rates", "11111", sparse, "weight 0.05; adapts under the schedule of its rates above 0.02"),
    Row(
        "fisher", "11111", lambda m, i: Made({}, lambda _: {"pattern": methods.fisher(0.3)}),
        "budget 0.3; adapts plain MAML's network", trained=False,
    ),
]  # fmt: skip


class Bench:
    """What all rows share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work
        self.sets = {s: data.load(args.data, root=args.root, split=s) for s in ("train", "val", "test")}
        self.tasks = data.sample_tasks(
            self.sets["test"], args.tasks, ways=WAYS, shots=args.shots, query=QUERY, seed=TEST_SEED
        )
        known = CONFIGURATIONS["glyphs" if args.data == "glyphs" else "cifar-1-shot"]
        self.width = args.width or known.width

    def settings(self, **more: Any) -> Settings:
        given = {"ways": WAYS, "shots": self.args.shots, "query": QUERY, "steps": STEPS, "lr": LR, "meta_batch": BATCH,
                 "val_tasks": 20, "val_every": 10**6}  # fmt: skip
        return Settings(**{**given, **more})

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        channels, height, _ = self.sets["train"].image_shape
        return models.conv4(ways=WAYS, in_channels=channels, width=self.width, image_size=height)

    def trained(self, folder: str, model: nn.Module, settings: Settings, iterations: int, made: Given) -> nn.Module:
        """The network after so many iterations in a folder, which are gone on with."""
        out = self.work / folder
        train(
            model, self.sets["train"], self.sets["val"], out=out, settings=settings, iterations=iterations,
            resume=(out / LAST).exists(), overwrite=True, progress=True, **made,
        )  # fmt: skip
        if not (at := out / ENVIRONMENT).exists():
            write_json(at, info.environment())
        return model.eval()

    def start(self) -> nn.Module:
        model = self.network()
        return self.trained("start", model, self.settings(pattern="11111"), self.args.start, {})

    def row(self, row: Row) -> tuple[nn.Module, Made]:
        """The trained network of a row, and what it adapts with."""
        model = self.start()
        made = row.make(model, self.sets["train"])
        folder, given = (row.name, made.train) if row.trained else (row.base, {})
        settings = self.settings(pattern=row.pattern, seed=1, **row.settings)
        return self.trained(folder, model, settings, self.args.iterations, given), made


def adapting(row: Row, model: nn.Module, made: Made) -> Given:
    """What `adapt` and `evaluate` take."""
    own = {"pattern": row.pattern, **made.adapt(model)}
    return own if "solver" in own else {"steps": STEPS, **({} if "rule" in own else {"lr": LR}), **own}


def measured(bench: Bench, row: Row) -> Given:
    """Scores of each task, times of an adaptation and of a meta-gradient, and memory at the peak of an adaptation."""
    model, made = bench.row(row)
    given = adapting(row, model, made)
    named: Given = {"method": row.method, "pattern": row.pattern, "told": row.told, "name": row.name, "base": row.base}
    named |= {"adapts": str(given["pattern"]), "commit": info.environment()["commit"]}
    try:
        found = evaluate(model, bench.tasks, **given)
    except FloatingPointError:
        return {**named, "failed": "diverged on a test task"}
    base = next(r for r in ROWS if r.name == row.base)
    other, plainly = (model, given) if base == row else bench_row(bench, base)
    xs, ys, _, _ = bench.tasks[0]
    runs = {"own": lambda: adapt(model, xs, ys, **given), "plain": lambda: adapt(other, xs, ys, **plainly)}
    with torch.no_grad():  # learned rates are numbers
        times = timed(runs, bench.args.seconds)
        (own_peak,) = measure_memory(model, xs, ys, {"own": given}).values()
    return {
        **named, "scores": found.scores.tolist(), "time_ms": list(times["own"]), "plain_ms": list(times["plain"]),
        **(gradients(bench, row, model, made) if row.trained and base != row else {}),
        **(closed_form(bench, model, given) if row.method == "ridge_head" else {}), "peak_mb": own_peak,
    }  # fmt: skip


def closed_form(bench: Bench, model: nn.Module, given: Given) -> Given:
    """What an adaptation of the head consists of, in ms: the frozen prefix, ten steps behind it, or one system."""
    (xs, ys, _, _), pattern, solver = bench.tasks[0], given["pattern"], given["solver"]
    descents = {n: {"pattern": pattern, "steps": n, "lr": LR} for n in (10, 100)}
    with torch.no_grad():
        adapt(model, xs, ys, **given)  # which prepares the prefix
        known = remembered.features_again(model, xs, ys, pattern, "follow")
        if known is None:
            return {}
        phi = known.run(xs)
        head = [known.meta[name] for name in known.head]
        runs = {
            "closed": lambda: adapt(model, xs, ys, **given),
            "prefix": lambda: known.run(xs),
            "system": lambda: solver.of_head(phi, *head, ys),
            "ten": lambda: adapt(model, xs, ys, **descents[10]),
            "hundred": lambda: adapt(model, xs, ys, **descents[100]),
        }
        found = timed(runs, bench.args.seconds)
    ms = {name: t.median for name, t in found.items()}
    return {"parts_ms": {**ms, "steps": (ms["hundred"] - ms["ten"]) / 9, "images": len(xs)}}


def bench_row(bench: Bench, row: Row) -> tuple[nn.Module, Given]:
    model, made = bench.row(row)
    return model, adapting(row, model, made)


def gradients(bench: Bench, row: Row, model: nn.Module, made: Made) -> Given:
    """Times of a meta-batch's gradient, with the method and by plain MAML."""
    tasks = data.sample_tasks(bench.sets["train"], BATCH, ways=WAYS, shots=bench.args.shots, query=QUERY, seed=9)
    settings = bench.settings(pattern=row.pattern, **row.settings)
    plainly = bench.settings(pattern=row.pattern)
    rule, parts = made.train.get("rule"), made.train.get("parts")
    if parts is not None:
        parts.of_run(rule, settings, 1)
    own, other, turn = copy.deepcopy(model), copy.deepcopy(model), itertools.count(bench.args.iterations)

    def method() -> None:
        own.zero_grad()
        if parts is None:
            meta_gradient(own, tasks, settings, rule=rule)
        else:
            parts.gradient(own, tasks, list(range(BATCH)), settings, next(turn))  # memory goes by iterations

    def maml() -> None:
        other.zero_grad()
        meta_gradient(other, tasks, plainly)

    found = timed({"own": method, "plain": maml}, bench.args.seconds)
    return {"iteration_ms": list(found["own"]), "plain_iteration_ms": list(found["plain"])}


def fields(bench: Bench) -> Given:
    """Neural fields: PSNR after 16 steps on a quarter of the points, of as many test pictures as are asked for, from
    a start that was trained for chosen points."""
    train_tasks, test = (methods.pictures(bench.sets[s]) for s in ("train", "test"))
    torch.manual_seed(0)
    given = {"inputs": 2, "outputs": test(0, 1)[0].ys.shape[-1], "width": 64, "layers": 4}
    field = models.create("lambda_maml.methods:siren", args=given)
    solver = descend(rules.sgd(0.01), 4, backward(select=methods.top_gradient(0.25)))
    parts = Parts(solver=solver, objective=methods.query_loss(F.mse_loss))
    settings = Settings(meta_batch=4, steps=4, lr=0.01, meta_lr=1e-4, clip_norm=1.0, val_tasks=4, val_every=10**6)
    out = bench.work / "fields"
    train(
        field, train_tasks, test, out=out, settings=settings, iterations=bench.args.iterations, parts=parts,
        loss=F.mse_loss, metric=F.mse_loss, lower_is_better=True, resume=(out / LAST).exists(), overwrite=True,
        progress=True,
    )  # fmt: skip

    def drawn(problem: Any, params: Any, step: int) -> Tensor:
        return torch.randperm(problem.rows, generator=problem.random(step))[: problem.rows // 4].sort().values

    steps = rules.sgd(0.01)
    ways = {
        "chosen": descend(steps, 16, backward(select=methods.top_gradient(0.25))),
        "random": descend(steps, 16, backward(select=drawn)),
        "rescaled": descend(steps, 16, methods.rescaled(methods.top_gradient(0.25))),
        "all": descend(steps, 16),
    }
    tasks = test(0, bench.args.pictures)
    scores: dict[str, list[float]] = {name: [] for name in ways}
    for xs, ys, xq, yq in tasks:
        for name, way in ways.items():
            with torch.no_grad():
                result = adapt(field, xs, ys, pattern="1111", solver=way, loss=F.mse_loss)(xq)
            scores[name].append(float(methods.psnr(F.mse_loss(result, yq))))
    found: Given = {}
    for name, own in scores.items():
        mean, ci95 = mean_ci95(torch.tensor(own))
        difference, wide = mean_ci95(torch.tensor(own) - torch.tensor(scores["random"]))
        found[name] = {"psnr": mean, "ci95": ci95, "difference": difference, "difference_ci95": wide}
    return {"pictures": len(tasks), "iterations": bench.args.iterations, "ways": found}


def compared(rows: list[Given]) -> list[Given]:
    """The rows with means and paired differences in the places of their scores."""
    whole = [row for row in rows if "failed" not in row]
    by_name = {row["name"]: torch.tensor(row["scores"], dtype=torch.float64) for row in whole}
    peaks, found = {row["name"]: row["peak_mb"] for row in whole}, [row for row in rows if "failed" in row]
    for row in whole:
        own = by_name[row["name"]]
        if row["base"] not in by_name:
            continue
        mean, ci95 = mean_ci95(own)
        difference, wide = mean_ci95(own - by_name[row["base"]])
        kept = {k: value for k, value in row.items() if k != "scores"} | {"plain_peak_mb": peaks[row["base"]]}
        found.append({**kept, "accuracy": mean, "ci95": ci95, "difference": difference, "difference_ci95": wide})
    return found


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--page", type=Path, help="where the page is written; from --json alone with --only none")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="results of other settings, for the page")
    parser.add_argument("--only", help="names of rows, with commas, such as alfa-00011; 'none' for none, 'fields'")
    parser.add_argument("--data", default="glyphs", help="the set, as `lambda_maml.data.load` has it")
    parser.add_argument("--root", type=Path, help="where the set lies")
    parser.add_argument("--shots", type=int, default=1, help="support images per class")
    parser.add_argument("--width", type=int, help="channels of conv4")
    parser.add_argument("--start", type=int, default=300, help="iterations of the common start")
    parser.add_argument("--iterations", type=int, default=300, help="iterations of each row")
    parser.add_argument("--tasks", type=int, default=400, help="test tasks")
    parser.add_argument("--pictures", type=int, default=100, help="test pictures of the neural fields")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, for each pair")
    args = parser.parse_args(words)
    args.same = [f"--{n}={getattr(args, n)}" for n in ("data", "shots", "start", "iterations", "tasks", "pictures")]
    args.same += [f"--{n}={getattr(args, n)}" for n in ("root", "width") if getattr(args, n) is not None]
    return args


def command(same: list[str]) -> str:
    """As anyone can give it: a machine's own folder has no part in it."""
    return " ".join(["python bench/methods.py", *("--root=DATA" if w.startswith("--root=") else w for w in same)])


def main(words: list[str] | None = None) -> None:
    args = parsed(words)
    torch.set_num_threads(1)
    by_name = {row.name: row for row in ROWS}
    wanted = [*by_name, "fields"] if args.only is None else [n for n in args.only.split(",") if n != "none"]
    if unknown := [n for n in wanted if n not in {*by_name, "fields"}]:
        raise SystemExit(f"methods: no row {', '.join(unknown)}; there are {', '.join(by_name)} and fields")
    if wanted:
        bench = Bench(args)
        args.work.mkdir(parents=True, exist_ok=True)
        settings = args.work / "settings.json"
        if settings.exists() and json.loads(settings.read_text("utf-8")) != args.same:
            raise SystemExit(f"methods: {settings} is of other settings: take another --work")
        write_json(settings, args.same)
        for name in wanted:
            kept = args.work / f"{name}.row.json"
            if not kept.exists():
                print(f"{name}", file=sys.stderr)
                write_json(kept, fields(bench) if name == "fields" else measured(bench, by_name[name]))
    rows = [json.loads(p.read_text("utf-8")) for n in by_name if (p := args.work / f"{n}.row.json").exists()]
    at = args.work / "fields.row.json"
    about = {
        "data": args.data, "start": args.start, "iterations": args.iterations, "tasks": args.tasks, "ways": WAYS,
        "shots": args.shots, "steps": STEPS, "lr": LR, "meta_batch": BATCH, "environment": info.environment(),
        "trained": sorted({json.loads(p.read_text("utf-8"))["commit"] for p in args.work.glob(f"*/{ENVIRONMENT}")}),
        "measured": sorted({row["commit"] for row in rows}),
        "date": datetime.date.today().isoformat(), "command": command(args.same),
    }  # fmt: skip
    if args.json and wanted:
        found = json.loads(at.read_text("utf-8")) if at.exists() else {}
        write_json(args.json, {"about": about, "rows": compared(rows), "fields": found})
    if args.page:
        results = [args.json, *args.more] if args.json else args.more
        args.page.write_text(methods_page.page([json.loads(p.read_text("utf-8")) for p in results]), encoding="utf-8")


if __name__ == "__main__":
    main()
