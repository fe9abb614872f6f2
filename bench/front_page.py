"""README.md's figures and its picture, from results: `python bench/front_page.py [--demo runs/demo/pattern.json]`.

With --demo the selection that `make demo` wrote becomes bench/results/demo.json first, and its picture is drawn twice,
for light and dark pages. tests/test_readme.py holds that README shows what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import experiments_page
import experiments_plan
import peers_report
import training_report
from gpu_report import ROOT, digits, times, write

README, DEMO = ROOT / "README.md", ROOT / "bench" / "results" / "demo.json"
PICTURES = {ROOT / "docs" / "demo.svg": False, ROOT / "docs" / "demo-dark.svg": True}
BEGIN, END = "<!-- bench/front_page.py writes the figures -->\n", "<!-- end of the figures -->\n"
CONFIGURATION = "cifar"
FULL, LAST = "11111", "00011"
Row = Mapping[str, Any]


def figures(adapted: Row, trained: Row, demo: Row, experiments: experiments_page.Results) -> str:
    """The table, and where its figures are from."""
    head = ("measured", "ours", "stock PyTorch", "ours is better by")
    rows = [*adaptation(adapted), *training(trained), *accuracy(demo), *on_images(experiments)]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    network = _row(adapted, "adapt")["network"], _row(trained, "meta")["network"]
    notes = [
        f"Adaptation runs from support tensors to adapted parameters: {network[0]}; {_source(adapted)}.",
        f"A meta-gradient is of 4 tasks with 75 query images each: {network[1]}; {_source(trained)}.",
        f"The demo: {demo['ways']}-way {demo['shots']}-shot glyphs, {demo['steps']} steps, {demo['test']['tasks']} "
        f"test tasks, a cost is paired over them with its 95% interval; {_machine(demo)}.",
        *where(experiments),
        "Ratios are medians of interleaved repeats, with quartiles.",
    ]
    wrapped = (textwrap.fill(note, 120, initial_indent="- ", subsequent_indent="  ") for note in notes)
    return "\n".join([*lines, "", *wrapped]) + "\n"


def adaptation(document: Row) -> Iterator[tuple[str, ...]]:
    row = _row(document, "adapt")
    stock = row["columns"][FULL]["stock_full"]
    for pattern, said, name in (
        (FULL, "", "stock_full"),
        (LAST, ", stock with all layers", "stock_full"),
        (LAST, ", stock with the same mask", "stock_masked"),
    ):
        columns = row["columns"][pattern]
        yield (
            f"adaptation, `{pattern}`{said}", _ms(columns["ours"]), _ms(columns.get(name, stock)),
            times(row["ratios"][pattern][name]),
        )  # fmt: skip


def training(document: Row) -> Iterator[tuple[str, ...]]:
    for bits in (FULL, LAST):
        rows = [row for row in _rows(document, "meta") if row["pattern"] == bits and row["second_order"]]
        columns = rows[0]["columns"]
        ratio = times(rows[0]["ratios"]["stock"])
        yield f"meta-gradient, second order, `{bits}`", _ms(columns["ours"]), _ms(columns["stock"]), ratio
    memory = _row(document, "graph")["columns"][FULL]
    name, ours, stock = f"its memory, `{FULL}`", memory["ours"], memory["stock"]
    yield name, f"{digits(ours)} MiB", f"{digits(stock)} MiB", f"{digits(stock / ours)}x"


def accuracy(report: Row) -> Iterator[tuple[str, ...]]:
    chosen, stock, test = report["chosen"], report["stock_full"], report["test"]
    name, beside = f"`make demo` chose `{chosen['pattern']}`", f", `{stock['pattern']}`"
    ours, full = chosen["time_ms"], stock["time_ms"]
    yield f"{name}: adaptation", f"{digits(ours)} ms", f"{digits(full)} ms{beside}", f"{digits(full / ours)}x"
    found = [f"{100 * test[key]:.2f}%" for key in ("chosen_accuracy", "full_accuracy")]
    cost = f"cost {100 * test['drop']:.2f} ± {100 * test['drop_ci95']:.2f} points"
    yield f"{name}: accuracy", found[0], f"{found[1]}{beside}", cost


def chosen(experiments: experiments_page.Results) -> Iterator[tuple[experiments_plan.Experiment, Row]]:
    """The choices after ten steps of the networks that `make experiments` has trained, one for each set: that of a
    pretrained network, else of one with the pattern in meta-training where plain MAML, which it is set beside, is there
    too, else of plain MAML."""
    for case in experiments_plan.CORE:
        same = [c for c in experiments_plan.PRETRAINED if (c.dataset, c.shots) == (case.dataset, case.shots)]
        for one, arm in [*((c, "pretrained") for c in same), (case, "fixed"), (case, "maml")]:
            run = experiments_plan.Experiment(one, arm, experiments_plan.SEEDS[0])
            if f"{run}.choice-k10" in experiments and (arm != "fixed" or f"{run.beside}.accuracy" in experiments):
                yield run, experiments[f"{run}.choice-k10"]
                break


def said_of(run: experiments_plan.Experiment) -> str:
    fixed = f", {experiments_plan.ARMS[run.arm].words}" if run.arm == "fixed" else ""
    return experiments_page.said_of(run.case, run.arm) + fixed


def on_images(experiments: experiments_page.Results) -> Iterator[tuple[str, ...]]:
    pages = experiments_page.Pages(experiments, list(experiments_plan.jobs()))
    for run, one in chosen(experiments):
        bits, steps, found = one["chosen"]["0.01"], one["plan"]["steps"], experiments_page.medians(experiments, one)
        own, stock, row = found[bits], found[experiments_page.STOCKS[FULL]], experiments_page.row_of(one, bits)
        if run.arm == "fixed":
            full = experiments_page.row_of(experiments[f"{run.beside}.accuracy"], FULL, steps=steps)
            (drop, *_) = pages.below(run.case, run.arm, steps, "0.01")
        else:
            full, drop = experiments_page.row_of(one, FULL), experiments_page.figure(row, "drop")
        name = f"{said_of(run)}, chosen at 1 point: `{bits}`"
        yield f"{name}: adaptation", f"{digits(own)} ms", f"{digits(stock)} ms, `{FULL}`", f"{digits(stock / own)}x"
        accuracies = f"{100 * row['accuracy']:.2f}%", f"{100 * full['accuracy']:.2f}%, `{FULL}`"
        yield f"{name}: accuracy", *accuracies, f"cost {experiments_page.in_points(drop)} points"


def where(experiments: experiments_page.Results) -> Iterator[str]:
    found = dict(chosen(experiments))
    if found:
        plan = next(iter(found.values()))["plan"]
        clocks = (experiments_page.clock(experiments, one) for one in found.values())
        machines = sorted({clock["machine"]["processor"] for clock in clocks if clock is not None})
        yield (
            f"{'; '.join(map(said_of, found))}: {plan['settings']['ways']}-way, {plan['steps']} steps, "
            f"{plan['test_tasks']} test tasks, a cost is paired over them with its 95% interval; "
            f"{' and '.join(machines)}, 1 thread; [all results](docs/experiments.md)."
        )
    if any(run.arm == "fixed" for run in found):
        yield (
            "With a pattern in meta-training too, the cost is that beside a network of plain MAML, and its interval "
            "that of a difference of independent means."
        )


def page(text: str, table: str) -> str:
    """README's text with the figures between their marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _rows(document: Row, kind: str) -> list[Row]:
    wanted = (kind, CONFIGURATION, "passed")
    return [row for row in document["rows"] if (row["kind"], row["configuration"], row["status"]) == wanted]


def _row(document: Row, kind: str) -> Row:
    return _rows(document, kind)[0]


def _ms(spread: Row) -> str:
    return f"{digits(spread['median'])} ms"


def _source(document: Row) -> str:
    found = document["machine"]
    return f"{found['processor']}, {found['threads']} threads, commit {found['commit']}, {document['started'][:10]}"


def _machine(report: Row) -> str:
    found = report["environment"]
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return f"{found['device']}, {threads}, commit {found['commit']}"


def results() -> tuple[Row, Row, Row, experiments_page.Results]:
    adapted = peers_report.read(peers_report.RESULTS)
    trained = peers_report.read(training_report.RESULTS, "training")
    demo = json.loads(DEMO.read_text(encoding="utf-8"))
    return adapted, trained, demo, experiments_page.read(ROOT / "results")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="A pattern.json of `make demo`.")
    given = parser.parse_args()
    if given.demo is not None:
        from lambda_maml.pattern_json import read_selection
        from lambda_maml.report import plot

        report = read_selection(given.demo)
        write(DEMO, json.dumps(report, indent=1) + "\n")
        for path, dark in PICTURES.items():
            plot(report, path, dark=dark)
    write(README, page(README.read_text(encoding="utf-8"), figures(*results())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
