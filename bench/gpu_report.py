"""docs/gpu.md from the results of `make gpu`: `python3 bench/gpu_report.py [RESULTS.json]`; no argument: the newest."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_page import FIGURES, HEAD, HOW, MODEL, NONE

ROOT = Path(__file__).resolve().parents[1]
BEST = ("stock_graph", "stock_graph_tuned", "compile_default", "compile_reduce_overhead")
NAMES = {
    "ours": "ours",
    "ours_dependent": "ours, dependent launches",
    "stock_full": "eager stock, all layers",
    "stock_masked": "eager stock, same mask",
    "stock_prefix": "the same, prefix by hand",
    "stock_graph": "the same as a CUDA graph",
    "stock_graph_tuned": "CUDA graph, tuned",
    "compile_default": "`torch.compile`",
    "compile_reduce_overhead": "`torch.compile`, reduce-overhead",
    "vmap": "`vmap` of stock",
}


def page(document: Mapping[str, Any] | None, model: Mapping[str, Any]) -> str:
    """The whole of docs/gpu.md."""
    if document is None:
        found = NONE + "\n" + "\n".join(goals({}, model)) + "\n"
    else:
        found = "\n" + table(document, model)
    return HEAD + found + HOW + "\n".join(of_model(model)) + "\n"


def of_model(model: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## The model", "", *MODEL.splitlines(), "", "| constant | | |", "| --- | --- | --- |")
    for name, (value, source) in model["constants"].items():
        yield f"| {name} | {value} | {source} |"


def table(document: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """What was found, in Markdown."""
    parts: list[str] = []
    if document["dry_run"]:
        parts.append("**A dry run in tiny shapes on the CPU, kernels interpreted: not a measurement.**\n")
    stages = document["stages"]
    rows = rows_of(document)
    parts += [*machine(document), "", *stage_table(stages), "", *goals(document, model), ""]
    sections = replays, adaptations, many, kernels, calls, lambda rows: patterns(stages), not_there
    for section in (section(rows) for section in sections):
        found = list(section)
        if found:
            parts += [*found, ""]
    return "\n".join(parts)


def rows_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of all stages, the important ones first."""
    stages = document.get("stages", {})
    return [row for name in ("replays", "rows", "slow") for row in stages.get(name, {}).get("rows", [])]


def summary(document: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The rows in a line each, and the goals: what is read at the end of a terminal."""
    lines = []
    for row in rows_of(document):
        if row.get("columns"):
            ratios = ", ".join(f"{times(r)} over {NAMES[name]}" for name, r in row["ratios"].items())
            said = f"{span(row['columns']['ours'])} ms, {ratios}"
        elif row.get("passes"):
            best = {name: fastest(done) for name, done in row["passes"].items()}
            said = ", ".join(f"{name} {b[1]:.0%} of its floor ({b[0]})" for name, b in best.items() if b)
        elif row.get("kernels"):
            said = f"{row['nodes']} nodes, {row['span_us'] / 1e3:.3g} ms"
        else:
            said = ""
        why = f"{row['status']}: {row['reason']}" if "reason" in row else ""
        lines.append(f"{row['name']}: {'; '.join(filter(None, [said, why])) or row['status']}")
    dry = ["", "A dry run in tiny shapes on the CPU: not a measurement."] if document["dry_run"] else []
    return "\n".join([*lines, "", *goals(document, model), *dry])


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
    c = found.get("ceilings") or document["stages"].get("rows", {}).get("ceilings", {})
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
    for check in stages.get("smoke", {}).get("checks", []):
        if check["status"] != "right":
            name = " ".join([check["backend"], check.get("operation", "")]).strip()
            yield f"| | {check['status']} | | {name}: {cell(check['reason'])} |"
    for failure in [f for name in ("tests", "capture") for f in stages.get(name, {}).get("failures", [])]:
        yield f"| | failed | | `{failure['test']}`: {cell(failure['reason'])} |"


def goals(document: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """Each figure with its goal: as it was measured, or else as the model predicts it."""
    dry, rows = document.get("dry_run", False), rows_of(document)
    yield "| figure | goal | found | |"
    yield "| --- | --- | --- | --- |"
    for figure in FIGURES:
        found = measured(figure.name, rows)
        if found is None:
            said, source = shown(model["figures"][figure.name], figure.unit), f"predicted for an {model['card']}"
        elif isinstance(found, str):
            said, source = f"no figure: {cell(found)}", measurement(document)
        else:
            value = shown(found["median"], figure.unit)
            value = times(found) if "q1" in found else value
            good = met(found["median"], figure.goal, dry, most=figure.unit == "")
            said, source = f"{value}, {good}{found.get('note', '')}", measurement(document)
        least = "at most " if figure.unit == "" else ""
        yield f"| {figure.what} | {least}{shown(figure.goal, figure.unit)} | {said} | {source} |"


def measurement(document: Mapping[str, Any]) -> str:
    if document["dry_run"]:
        return "a dry run"
    return f"measured, {document['gpu']}, {document['started'][:10]}, commit {document['commit']}"


def shown(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:g}{unit}"


def measured(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | str | None:
    """What was found of a figure; a text where it was wrong, None where nothing was found."""
    kind, *words = name.split()
    if kind == "nodes":
        row = next((row for row in rows if row["name"] == f"replay {words[0]} of 1"), {})
        if row.get("status") == "failed":
            return str(row["reason"])
        return {"median": row["nodes"]} if "nodes" in row else None
    if kind == "block":
        of = [row for row in rows if row["kind"] == "kernel" and row["name"].startswith(f"block {words[0]}:")]
        passes = [row["passes"][words[1]] for row in of if words[1] in row.get("passes", {})]
        found = fastest(passes[0]) if passes else None
        return {"median": found[1], "note": f" ({found[0]})"} if found else "; ".join(failures(passes)) or None
    return found_ratio(rows, kind, words[0], words[-1], words[1] if len(words) > 2 else "float32")


def failures(passes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f["failed"] for done in passes for f in done["backends"].values() if "failed" in f]


def found_ratio(
    rows: Sequence[Mapping[str, Any]], kind: str, pattern: str, column: str, dtype: str
) -> dict[str, Any] | str | None:
    """The ratio, or why there is none. Against the best by hand: the smallest of those that were timed."""
    kinds = {"best": ("adapt", "compile"), "vmap": ("vmap",)}.get(column, (kind,))
    network = next((row["network"] for row in rows if row["main"]), "")
    own = [
        row for row in rows
        if row["kind"] in kinds and (row["pattern"], row["dtype"], row["network"]) == (pattern, dtype, network)
    ]  # fmt: skip
    for row in own:
        if row["status"] == "failed":
            return str(row["reason"])
    wanted = BEST if column == "best" else (column,)
    ratios = [row["ratios"][name] for row in own for name in wanted if name in row.get("ratios", {})]
    if not ratios:
        return None
    missing = {name for name in wanted if not any(name in row.get("ratios", {}) for row in own)}
    note = f" (without {', '.join(NAMES[n] for n in wanted if n in missing)})" if missing else ""
    return {**min(ratios, key=lambda ratio: ratio["median"]), "note": note}


def met(value: float, goal: float, dry: bool, most: bool = False) -> str:
    """Whether a value is no less than its goal, or with `most` no more."""
    return "not a measurement" if dry else "reached" if (value <= goal if most else value >= goal) else "not reached"


def fastest(found: Mapping[str, Any]) -> tuple[str, float] | None:
    """(backend, fraction of the floor) of the fastest one in a pass of a block."""
    timed = {name: f["fraction_of_floor"] for name, f in found["backends"].items() if "fraction_of_floor" in f}
    return max(timed.items(), key=lambda item: item[1]) if timed else None


def replays(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in [row for row in rows if row.get("kernels")]:
        yield f"### One replay: `{row['pattern']}`, {row['tasks']} task{'s' * (row['tasks'] > 1)}"
        yield ""
        yield f"{row['nodes']} nodes, {digits(row['span_us'])} us from the first one's start to the last one's end."
        yield ""
        yield "| kernel | count | us |"
        yield "| --- | --- | --- |"
        for entry in row["kernels"][:12]:
            yield f"| `{cell(entry['name'])[:80]}` | {entry['count']} | {digits(entry['us'])} |"
        yield ""


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
        [row for row in rows if row["kind"] in ("tasks", "vmap") and row.get("columns")],
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


def predictions() -> dict[str, Any]:
    """What `bench/gpu_model.py` wrote."""
    found: dict[str, Any] = json.loads((ROOT / "bench" / "results" / "gpu-model.json").read_text(encoding="utf-8"))
    return found


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
    model = predictions()
    write(given.page, page(document, model))
    if document is not None:
        print(summary(document, model))
        if given.table:
            write(given.table, table(document, model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
