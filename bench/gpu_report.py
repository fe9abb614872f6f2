"""docs/gpu.md from the results of `make gpu`: `python3 bench/gpu_report.py [RESULTS.json]`; no argument: the newest."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Of the table: (kind of row, pattern) -> how often faster than which column. "best" is the fastest of BEST.
GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("adapt", "11111"): {"stock_full": 8.0, "best": 1.5},
    ("adapt", "00011"): {"stock_full": 30.0, "best": 1.5},
    ("tasks", "00011"): {"stock_full": 200.0, "vmap": 5.0},
}
FLOOR_GOAL = 0.7
BEST = ("stock_graph", "stock_graph_tuned", "compile_default", "compile_reduce_overhead")
NAMES = {
    "ours": "ours",
    "stock_full": "eager stock, all layers",
    "stock_masked": "eager stock, same mask",
    "stock_prefix": "the same, prefix by hand",
    "stock_graph": "the same as a CUDA graph",
    "stock_graph_tuned": "CUDA graph, tuned",
    "compile_default": "`torch.compile`",
    "compile_reduce_overhead": "`torch.compile`, reduce-overhead",
    "vmap": "`vmap` of stock",
    "best": "the best of graph and `torch.compile`",
}
HEAD = """# On a GPU

```sh
make gpu
```

builds, tests, checks and measures on a machine with a GPU whose `python3` already has torch, triton and pytest, beside
nvcc, and which has no network; `make gpu PYTHON=python3.12` names another interpreter. The stages are the machine and
its ceilings, build, tests, `compute-sanitizer` (memcheck, racecheck), benchmark, timings of all patterns, report. Each
has a deadline within one budget (`make gpu GPU_ARGS="--seconds 300"`), and the results are rewritten after each row: a
run that is cut off keeps what it had. `make gpu GPU_ARGS="--only build,bench"` runs some stages, and
`make gpu GPU_ARGS=--dry-run` starts all of them on any machine, in tiny shapes on the CPU; nothing of that is a
measurement.

It writes `bench/results/<gpu>-<date>.json`, beside it a file of timings for `select --timings`, and this page
(`bench/gpu_report.py` writes it anew from the newest results). With `OUT` set to a folder they are copied there,
with the log. On a cluster: [clusters.md](clusters.md).
"""
NONE = """
## Nothing has run on a GPU yet

There are no results from a GPU in this checkout, and so no figures. Without a GPU the tests run the CUDA sources in an
emulator and the Triton kernels in Triton's interpreter, compile both where nvcc and triton are there, and play a
graph's rules on a tape of operators. Unproven until there are results:

- that the CUDA library and the Triton kernels give right results on a device; the CUDA sources were one file, and are
  now a file per operation in `csrc/cuda/`;
- that the updates with a rate per parameter and step do so (`csrc/cuda/sgd.cu`, `backends/triton/update.py`), and that
  a rate of 0 leaves a parameter as it is;
- that a CUDA graph of the present inner loop replays what it recorded: `inner/recorded.py` around `inner/loop.py`, with
  schedules, with rates per step, and with the query forward (`backends/inner_loop.py`);
- that backends of your own, and the choice by measurement, work on a device with blocks as one argument and calls seen
  as a whole;
- that TorchDynamo captures a `forward` there as it does here: captures were tried with torch 2.13 on CPUs alone, and
  the first-call check of a program has not run on a device;
- that the outer gradient, made of a backend's operations (`backends/outer_step.py`), gives right results on a
  device, and training with a rank per GPU (NCCL) too;
- every speed, and the goals below.
"""
HOW = """
## How it is measured

- Adaptation time runs from support tensors to adapted parameters, as the caller sees it: wall clock around the call,
  the device waited for before and after. All columns of a row alternate in one process, in shuffled order; a ratio is
  taken inside each round and given as its median with the quartiles.
- "Eager stock, all layers" is the plain loop in torch's layers. The columns by hand are what one could write instead:
  frozen parameters without gradients; the frozen layers ahead of the first updated one run once; that as one CUDA graph
  of all steps over static buffers ("tuned": channels-last, cuDNN's algorithms chosen by measurement); prefix and step
  through `torch.compile`. Their parameters are put back off the clock; ours pays for its own copies.
- torch's default switches hold: TF32 in convolutions, not in matrix products.
- The network has random weights, the images are random pixels. Many tasks: `adapt_tasks` with one query image per task,
  and the same in the columns beside it; time per task.
- The fused block is timed by events around replays of a graph that goes through several input sets where one would fit
  in the L2 cache. Its floor is the larger of two times: every input read once and every output written once at the
  speed of a large copy, and its multiply-adds at the rate of a large matrix product, both measured in the same run.
- A row whose result disagrees with stock PyTorch in float64 has no times.
"""


def page(document: Mapping[str, Any] | None) -> str:
    """The whole of docs/gpu.md."""
    if document is None:
        return HEAD + NONE + "\n" + "\n".join(goals({})) + "\n" + HOW
    return HEAD + "\n" + table(document) + HOW


def table(document: Mapping[str, Any]) -> str:
    """What was found, in Markdown."""
    parts: list[str] = []
    if document["dry_run"]:
        parts.append("**A dry run in tiny shapes on the CPU, kernels interpreted: not a measurement.**\n")
    stages = document["stages"]
    rows = stages.get("bench", {}).get("rows", [])
    parts += [*machine(document), "", *stage_table(stages), "", *goals(document), ""]
    for section in (adaptations(rows), many(rows), kernels(rows), calls(rows), patterns(stages), not_there(rows)):
        found = list(section)
        if found:
            parts += [*found, ""]
    return "\n".join(parts)


def summary(document: Mapping[str, Any]) -> str:
    """The rows in a line each, and the goals: what is read at the end of a terminal."""
    lines = []
    for row in document["stages"].get("bench", {}).get("rows", []):
        if row.get("columns"):
            ratios = ", ".join(f"{times(r)} over {NAMES[name]}" for name, r in row["ratios"].items())
            said = f"{span(row['columns']['ours'])} ms, {ratios}"
        elif row.get("passes"):
            best = {name: fastest(done) for name, done in row["passes"].items()}
            said = ", ".join(f"{name} {b[1]:.0%} of its floor ({b[0]})" for name, b in best.items() if b)
        else:
            said = ""
        why = f"{row['status']}: {row['reason']}" if "reason" in row else ""
        lines.append(f"{row['name']}: {'; '.join(filter(None, [said, why])) or row['status']}")
    dry = ["", "A dry run in tiny shapes on the CPU: not a measurement."] if document["dry_run"] else []
    return "\n".join([*lines, "", *goals(document), *dry])


def machine(document: Mapping[str, Any]) -> Iterator[str]:
    found = document["stages"].get("environment", {}).get("found") or {}
    yield f"## {document['gpu']}, {document['started'][:10]}"
    yield ""
    yield f"Commit {document['commit']}; {document.get('seconds', 0):.0f} s."
    if not found:
        return
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    nvcc, cudnn = found["nvcc"] or "not found", found["cudnn"] or "none"
    yield f"Python {found['python']}, {versions}; nvcc {nvcc}; cuDNN {cudnn}."
    if gpu := found.get("gpu"):
        yield (
            f"{gpu['name']}: sm_{gpu['capability'].replace('.', '')}, {gpu['multiprocessors']} multiprocessors, "
            f"{gpu['memory_gib']} GiB, L2 {gpu['l2_mib']} MiB, driver {gpu.get('driver_version', 'unknown')}."
        )
    yield ""
    yield "| measured ceiling | |"
    yield "| --- | --- |"
    c = found["ceilings"]
    yield f"| large copy, bytes read and written | {c['copy_bytes_per_s'] / 1e9:,.0f} GB/s |"
    for key, name in (("float32", "float32"), ("tf32", "TF32"), ("bfloat16", "bfloat16")):
        yield f"| large matrix product, {name} | {digits(c[f'matmul_{key}_flops'] / 1e12)} TFLOP/s |"


def stage_table(stages: Mapping[str, Any]) -> Iterator[str]:
    yield "| stage | | seconds | |"
    yield "| --- | --- | --- | --- |"
    for name, stage in stages.items():
        if name == "report":
            continue
        what = stage.get("reason", "")
        if outcomes := stage.get("outcomes"):
            what = "; ".join(filter(None, [", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()), what]))
        yield f"| {name} | {stage['status']} | {stage.get('seconds', 0):.0f} | {cell(what)} |"
    for failure in stages.get("tests", {}).get("failures", []):
        yield f"| | failed | | `{failure['test']}`: {cell(failure['reason'])} |"


def goals(document: Mapping[str, Any]) -> Iterator[str]:
    """Each goal, and what was found beside it."""
    rows = document.get("stages", {}).get("bench", {}).get("rows", [])
    dry = document.get("dry_run", False)
    yield "| goal | of | over | found |"
    yield "| --- | --- | --- | --- |"
    for (kind, pattern), wanted in GOALS.items():
        for column, goal in wanted.items():
            found = found_ratio(rows, kind, pattern, column)
            what = "`adapt_tasks`, 64 tasks, per task" if kind == "tasks" else "`adapt`"
            reached = verdict(found, goal, dry)
            yield f"| {goal:g}x | {what}, `{pattern}` | {NAMES[column]} | {reached} |"
    for name in ("forward", "backward"):
        layers = [row for row in rows if row["kind"] == "kernel" and name in row.get("passes", {})]
        for number, row in enumerate(layers, 1):
            share = fastest(row["passes"][name])
            said = "no figure" if share is None else f"{share[1]:.0%} ({share[0]}), {met(share[1], FLOOR_GOAL, dry)}"
            yield f"| {FLOOR_GOAL:.0%} of the floor | fused block {number}, {name}, 64 tasks | | {said} |"
        if not layers:
            yield f"| {FLOOR_GOAL:.0%} of the floor | fused block, {name}, 64 tasks | | open |"


def found_ratio(rows: Sequence[Mapping[str, Any]], kind: str, pattern: str, column: str) -> dict[str, Any] | str:
    """The ratio, or why there is none. Against the best by hand: the smallest of those that were timed."""
    kinds = ("adapt", "compile") if column == "best" else (kind,)
    own = [row for row in rows if row["kind"] in kinds and row["pattern"] == pattern and row["main"]]
    for row in own:
        if row["status"] == "failed":
            return f"no figure: {row['reason']}"
    wanted = BEST if column == "best" else (column,)
    ratios = [row["ratios"][name] for row in own for name in wanted if name in row.get("ratios", {})]
    if ratios:
        missing = {name for name in wanted if not any(name in row.get("ratios", {}) for row in own)}
        note = f" (without {', '.join(NAMES[n] for n in wanted if n in missing)})" if missing else ""
        return {**min(ratios, key=lambda ratio: ratio["median"]), "note": note}
    return "; ".join(filter(None, (row.get("reason") for row in own))) or "open"


def verdict(found: Mapping[str, Any] | str, goal: float, dry: bool) -> str:
    if isinstance(found, str):
        return cell(found)
    return f"{times(found)}, {met(found['median'], goal, dry)}{found['note']}"


def met(value: float, goal: float, dry: bool) -> str:
    return "not a measurement" if dry else "reached" if value >= goal else "not reached"


def fastest(found: Mapping[str, Any]) -> tuple[str, float] | None:
    """(backend, fraction of the floor) of the fastest one in a pass of a block."""
    timed = {name: f["fraction_of_floor"] for name, f in found["backends"].items() if "fraction_of_floor" in f}
    return max(timed.items(), key=lambda item: item[1]) if timed else None


def adaptations(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from timed_rows(
        "### Adaptation time",
        "Milliseconds, and how often faster ours is.",
        [row for row in rows if row["kind"] in ("adapt", "compile") and row.get("columns")],
    )
    query = [row for row in rows if row["kind"] == "query" and row.get("columns")]
    if query:
        yield ""
        what = f"Adaptation and the logits of {query[0]['query']} query images."
        yield from timed_rows("### With the query", what, query)


def many(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from timed_rows(
        "### Many tasks",
        "Milliseconds per task.",
        [row for row in rows if row["kind"] == "tasks" and row.get("columns")],
    )


def timed_rows(title: str, what: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield title
    yield ""
    yield what
    yield ""
    yield "| pattern | network | | milliseconds | ours is faster by |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        network = row["network"] + ("" if row["dtype"] == "float32" else f", {row['dtype']}")
        for name in NAMES:
            column = row["columns"].get(name)
            if column is None:
                continue
            head = f"| `{row['pattern']}` | {network} | {NAMES[name]} |"
            if "skipped" in column:
                yield f"{head} | {cell(column['skipped'])} |"
            else:
                ratio = times(row["ratios"][name]) if name in row["ratios"] else ""
                yield f"{head} {span(column)} | {ratio} |"


def kernels(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = [row for row in rows if row["kind"] == "kernel" and row.get("passes")]
    if not found:
        return
    yield "### The fused block, float32"
    yield ""
    yield "| block | pass | floor, ms | backend | ms | of the floor | GB/s | TFLOP/s |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in found:
        for name, done in row["passes"].items():
            floor = f"{digits(done['floor_ms'])} ({done['bound']})"
            for backend, f in done["backends"].items():
                head = f"| {row['name']} | {name} | {floor} | {backend} |"
                if "median" in f:
                    rates = f"{f['bytes_per_s'] / 1e9:,.0f} | {digits(f['flops_per_s'] / 1e12)}"
                    yield f"{head} {span(f)} | {f['fraction_of_floor']:.0%} | {rates} |"
                elif "failed" in f:
                    yield f"{head} wrong: {cell(f['failed'])} | | | |"


def calls(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = [row for row in rows if row.get("counts")]
    if not found:
        return
    yield "### What one adaptation asks of the device"
    yield ""
    yield "| pattern | | kernel launches | graph launches | kernels run | copies, fills | peak memory of a first call |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in found:
        for name, c in row["counts"].items():
            keys = ("kernel_launches", "graph_launches", "kernels", "copies_and_fills")
            counts = " | ".join(str(c[key]) for key in keys)
            yield f"| `{row['pattern']}` | {NAMES[name]} | {counts} | {c['peak_mib']:,.0f} MiB |"


def patterns(stages: Mapping[str, Any]) -> Iterator[str]:
    found = stages.get("timings", {}).get("patterns", [])
    if not found:
        return
    yield "### All patterns"
    yield ""
    yield f"By `bench/bench_adapt.py`, {stages['timings']['group']}; milliseconds."
    yield ""
    yield "| pattern | | over eager stock, all layers |"
    yield "| --- | --- | --- |"
    for row in sorted(found, key=lambda row: row["median"]):
        name = f"`{row['pattern']}`{'' if row['kind'] == 'adapt' else ' in stock PyTorch'}"
        speed = row.get("speedup_over_stock")
        yield f"| {name} | {span(row)} | {'' if speed is None else f'{digits(speed)}x'} |"


def not_there(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows that failed or did not run, with the reason."""
    missing = [row for row in rows if row["status"] != "passed"]
    if not missing:
        return
    yield "### Rows without a figure"
    yield ""
    for row in missing:
        yield f"- {row['name']}: {row['status']}, {row.get('reason', 'no reason')}"


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def span(spread: Mapping[str, float]) -> str:
    return f"{digits(spread['median'])} ({digits(spread['q1'])} to {digits(spread['q3'])})"


def times(ratio: Mapping[str, float]) -> str:
    return f"{digits(ratio['median'])}x ({digits(ratio['q1'])} to {digits(ratio['q3'])})"


def cell(text: str) -> str:
    """Text that does not end a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("schema") != 1:
        raise SystemExit(f'{path.name}: not the results of make gpu (no "schema": 1)')
    return document


def newest(folder: Path) -> dict[str, Any] | None:
    """The results that were begun last, dry runs aside; None where there are none from a GPU."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.name[-15:-5].replace("-", "").isdigit()]
    found = [document for document in map(read, paths) if not document["dry_run"]]
    return max(found, key=lambda document: document["started"], default=None)


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add, page_here = parser.add_argument, ROOT / "docs" / "gpu.md"
    add("results", type=Path, nargs="?", help="JSON of make gpu. Default: the newest in bench/results")
    add("--page", type=Path, default=page_here, help="Where to write. Default: docs/gpu.md")
    add("--table", type=Path, help="File for the tables alone.")
    given = parser.parse_args()
    document = read(given.results) if given.results else newest(ROOT / "bench" / "results")
    write(given.page, page(document))
    if document is not None:
        print(summary(document))
        if given.table:
            write(given.table, table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
