"""What bench_peers.py measures: its configurations, its kinds of rows, its command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import peers_report
from harness import CONFIGURATIONS, Configuration

KINDS = ("adapt", "packages", "query", "growth", "tasks", "memory", "general", "odd")
# Where the rows that are not taken everywhere are taken.
PLACES = {
    "growth": ("mini-imagenet-64", "mini-imagenet-5-shot", "mini-imagenet"),
    "tasks": ("omniglot", "cifar-1-shot", "mini-imagenet"),
    "memory": ("mini-imagenet-64", "cifar", "omniglot"),
}
RESIDUAL = {"residual-84": Configuration(84, 3, 32, 5, 1, 5), "residual-32": Configuration(32, 3, 32, 5, 5, 5)}
RESIDUAL_PATTERN = "00000111"  # the last block and the head
# Sizes that fill neither vectors nor tiles; 5 and 75 images.
ODD = {
    f"odd-{size}-{width}-{5 * shots}": Configuration(size, 3, width, 5, shots, 5)
    for size in (7, 21, 33)
    for width in (1, 5, 48, 100)
    for shots in (1, 15)
}
QUERY, MANY = 15, 16  # query images per class; tasks


class Options(NamedTuple):
    configurations: Mapping[str, Configuration]
    residual: Mapping[str, Configuration]
    odd: Mapping[str, Configuration]
    kinds: Sequence[str]
    seconds: float
    rounds: int
    compile_seconds: float
    compile_full: bool
    compile_backend: str
    places: Mapping[str, Sequence[str]]


def parse(arguments: Sequence[str] | None, description: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    known = "; ".join(f"{name}: {CONFIGURATIONS[name]}" for name in peers_report.GOALS)
    add("--configurations", type=names_of(list(CONFIGURATIONS)), default=list(peers_report.GOALS), metavar="NAMES",
        help=f"Separated by commas. Default: all of the goals' ({known})")  # fmt: skip
    add("--kinds", type=names_of(KINDS), default=list(KINDS), metavar="NAMES",
        help=f"Kinds of rows, separated by commas, of {','.join(KINDS)}. Default: all")  # fmt: skip
    add("--seconds", type=float, default=15.0,
        help="Of a configuration's main rows; others take a part. At least three rounds. Default: "
             "%(default)s")  # fmt: skip
    add("--rounds", type=int, default=200, help="Rounds of a row at most. Default: %(default)s")
    add("--threads", type=int, help="Threads of torch. Default: torch's own choice")
    add("--compile-seconds", type=float, default=180.0,
        help="Once it compiled for that long, torch.compile is left out. Default: %(default)s")  # fmt: skip
    add("--compile-full", action="store_true", help="torch.compile under the full pattern too.")
    add("--compile-backend", default="inductor", help="Of torch.compile. Default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="Results, rewritten after each row.")
    add("--markdown", type=Path, metavar="FILE", help="The tables.")
    add("--plot", type=Path, metavar="FILE", help="The picture, .svg or .png.")
    add("--tiny", action="store_true", help="Tiny shapes, to see that everything runs; nothing of it is a measurement.")
    return parser.parse_args(arguments)


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}: choose from {', '.join(known)}")
        return found

    return names


def options_of(given: argparse.Namespace) -> Options:
    configurations = {name: CONFIGURATIONS[name] for name in given.configurations}
    blocks, odd, places = RESIDUAL, ODD, PLACES
    if given.tiny:
        small = {"image_size": 16, "width": 4, "ways": 3, "shots": 2, "steps": 2}
        configurations = {name: c._replace(**small) for name, c in configurations.items()}
        blocks = {name: c._replace(**small) for name, c in blocks.items()}
        odd = {"odd-7-5-6": Configuration(7, 3, 5, 3, 2, 2)}
        places = {}
    return Options(
        configurations, blocks, odd, given.kinds, given.seconds, given.rounds, given.compile_seconds,
        given.compile_full, given.compile_backend, places,
    )  # fmt: skip


def command(script: str, given: argparse.Namespace, default: argparse.Namespace) -> str:
    """The script's command line, less the files."""
    usual = vars(default)
    words = [f"python bench/{script}"]
    for name, value in vars(given).items():
        if name not in ("json", "markdown", "plot") and value != usual[name]:
            text = ",".join(value) if isinstance(value, list) else str(value)
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={text}"))
    return " ".join(words)
