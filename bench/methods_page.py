"""docs/methods.md, from the catalogue of methods and from what bench/methods.py measured."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lambda_maml.methods import METHODS

HEAD = """# Related methods

`lambda_maml.methods` holds these parts; `lambda-maml methods` prints the same list. Each file begins with its paper and
equations, and says what differs here. [How they are used](use.md#related-methods).

"""


def page(results: Sequence[Mapping[str, Any]]) -> str:
    text = HEAD + listed()
    for result in results:
        if result.get("rows"):
            text += "\n" + table(result)
        if result.get("fields"):
            text += "\n" + fields(result["fields"])
    return text


def listed() -> str:
    """The catalogue."""
    lines = ["| method | place | needs | on the fast chain | paper |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| `{m.name}` | {m.place} | {m.needs or '-'} | {m.chain} | {m.paper} |" for m in METHODS.values()]
    return "\n".join(lines) + "\n"


def short(commits: Sequence[str]) -> str:
    return " and ".join(commit[:12] for commit in commits)


def verdict(difference: float, ci95: float) -> str:
    if difference - ci95 > 0:
        return "gains"
    return "loses" if difference + ci95 < 0 else "no gain within its interval"


def table(result: Mapping[str, Any]) -> str:
    about, environment = result["about"], result["about"]["environment"]
    how = (
        f"`{about['command']}`, {about['date']}, on {environment['device']}, {environment['threads']} thread, torch "
        f"{environment['torch']}; measured at commit {short(about['measured'])}, trained at {short(about['trained'])}. "
        "Times are processor time, medians of interleaved repeats beside plain MAML in one process; other work was on "
        "the machine. All rows begin with the same network, which plain MAML under 11111 trained "
        f"for {about['start']} iterations, and train {about['iterations']} more of {about['meta_batch']} tasks, "
        f"{about['ways']}-way {about['shots']}-shot, {about['steps']} steps of {about['lr']}. Accuracy is that of "
        f"{about['tasks']} test tasks, the same ones for all; the difference is that to plain MAML under the same "
        "pattern, paired task by task, with its 95% interval. One seed of training: an interval says what the test "
        "tasks leave open, not what another run of training would."
    )
    titles = (
        "method", "pattern", "accuracy %", "difference, points", "", "adaptation ms (plain)",
        "meta-gradient, times plain's", "peak MB (plain)", "row",
    )  # fmt: skip
    title = f"## Beside plain MAML, on {about['data']}, {about['ways']}-way {about['shots']}-shot"
    lines = [title, "", textwrap.fill(how, 120), ""]
    lines += [f"| {' | '.join(titles)} |", "| " + " | ".join(["---"] * len(titles)) + " |"]
    for row in result["rows"]:
        if "failed" in row:
            told = f"`{row['method']}` ({row['told']}) | {row['pattern']} | - | - | {row['failed']} | - | - | -"
            lines.append(f"| {told} | `--only {row['name']}` |")
            continue
        is_base = row["name"] == row["base"]
        difference = "-" if is_base else f"{100 * row['difference']:+.2f} ± {100 * row['difference_ci95']:.2f}"
        says = "-" if is_base else verdict(row["difference"], row["difference_ci95"])
        ratio = f"{row['iteration_ms'][0] / row['plain_iteration_ms'][0]:.2f}" if "iteration_ms" in row else "-"
        pattern = row["pattern"] if row["adapts"] == row["pattern"] else f"{row['pattern']}, adapts {row['adapts']}"
        told = f"`{row['method']}`" + (f" ({row['told']})" if row["told"] else "")
        peaks = f"{row['peak_mb']:.1f} ({row['plain_peak_mb']:.1f})"
        times = f"{row['time_ms'][0]:.2f} ({row['plain_ms'][0]:.2f})"
        accuracy = f"{100 * row['accuracy']:.2f} ± {100 * row['ci95']:.2f}"
        cells = (told, pattern, accuracy, difference, says, times, ratio, peaks, f"`--only {row['name']}`")
        lines.append(f"| {' | '.join(cells)} |")
    for row in result["rows"]:
        if "parts_ms" in row:
            lines += ["", textwrap.fill(closed_form(row), 120)]
    return "\n".join(lines) + "\n"


def closed_form(row: Mapping[str, Any]) -> str:
    """What the head's closed form and ten steps of descent consist of, and what follows for their ratio."""
    ms = row["parts_ms"]
    bound = ms["ten"] / ms["prefix"]
    text = (
        f"Parts of `{row['method']}` on {ms['images']} images: the frozen prefix takes {ms['prefix']:.3f} ms in both, "
        f"ten steps behind it {ms['steps']:.3f} ms, the closed form's system {ms['system']:.3f} ms; ten steps as a "
        f"whole {ms['ten']:.3f} ms, the closed form {ms['closed']:.3f} ms, a ratio of {ms['ten'] / ms['closed']:.2f}. "
    )
    if bound < 3:
        text += (
            f"Even without any system it could be at most {bound:.2f} times as fast as ten steps, whose cost is the "
            "prefix: three times is out of reach on this network. "
        )
    return text + f"Behind the prefix ten steps take {ms['steps'] / ms['system']:.2f} times as long as the system."


def fields(found: Mapping[str, Any]) -> str:
    how = (
        f"A SIREN of 64 units and 4 layers, trained for {found['iterations']} iterations with `top_gradient(0.25)`; "
        f"PSNR after 16 steps of 0.01 on {found['pictures']} test pictures, the difference to random points paired. "
        "`--only fields`."
    )
    lines = ["## Neural fields", "", textwrap.fill(how, 120), ""]
    lines += ["| points of a step | PSNR dB | difference to random, dB | |", "| --- | --- | --- | --- |"]
    told = {
        "chosen": "25%, `top_gradient`", "random": "25%, at random", "rescaled": "all, `rescaled`", "all": "all"
    }  # fmt: skip
    for name, row in found["ways"].items():
        same = name == "random"
        difference = "-" if same else f"{row['difference']:+.2f} ± {row['difference_ci95']:.2f}"
        says = "-" if same else verdict(row["difference"], row["difference_ci95"])
        lines.append(f"| {told[name]} | {row['psnr']:.2f} ± {row['ci95']:.2f} | {difference} | {says} |")
    return "\n".join(lines) + "\n"
