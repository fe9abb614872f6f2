"""`lambda-maml predict` and `lambda-maml export`: an adapted network classifies, or becomes a file for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_types import PLACE
from .console import device_of, device_option, json_option, print_json, say

if TYPE_CHECKING:
    from torch import Tensor

    from .learner import Learner

__all__ = ["export", "predict", "predictions"]

AT_ONCE = 256
"""Images that are read and classified at a time."""


def predictions(files: Sequence[Path], classes: Sequence[str], logits: Tensor) -> list[dict[str, Any]]:
    """Of each image its class, the probability of that, and those of all classes, the likeliest first."""
    chances = logits.float().softmax(-1).tolist()
    ranked = [sorted(zip(classes, row), key=lambda pair: -pair[1]) for row in chances]
    return [
        {"image": str(path), "class": row[0][0], "probability": row[0][1], "probabilities": dict(row)}
        for path, row in zip(files, ranked, strict=True)
    ]


def line(prediction: Mapping[str, Any], top: int = 1) -> str:
    """An image and its likeliest classes, for people."""
    likeliest = list(prediction["probabilities"].items())[:top]
    return f"{prediction['image']}: " + ", ".join(f"{name} ({chance:.1%})" for name, chance in likeliest)


@click.command()
@click.argument("checkpoint", type=PLACE)
@click.argument("images", type=PLACE, nargs=-1, required=True)
@click.option("--top", type=click.IntRange(1), default=1, help="Name so many of the likeliest classes.")
@device_option
@json_option
def predict(checkpoint: Path, images: tuple[Path, ...], top: int, device: str, as_json: bool) -> None:
    """Classify images by an adapted network, each by itself.

    CHECKPOINT is what `adapt --out` or `export` wrote: a .safetensors, or an .onnx, which ONNX Runtime runs. IMAGES are
    files and folders; images are read as the support set was. With --json the probabilities of all classes.
    """
    from .images import query_files

    files = [file for path in images for file in (query_files(path) if path.is_dir() else [path])]
    classes, classify = _classifier(checkpoint, device)
    found: list[dict[str, Any]] = []
    for at in range(0, len(files), AT_ONCE):
        part = files[at : at + AT_ONCE]
        found += predictions(part, classes, classify(part))
    if as_json:
        print_json({"classes": classes, "predictions": found})
        return
    for prediction in found:
        click.echo(line(prediction, top))


@click.command()
@click.argument("checkpoint", type=PLACE)
@click.option("--out", type=PLACE, required=True, help="The file: NAME.pt2 or NAME.onnx.")
@click.option("--normalise", is_flag=True, help="The file takes pixels, uint8, and normalises them itself.")
@json_option
def export(checkpoint: Path, out: Path, normalise: bool, as_json: bool) -> None:
    """Write an adapted network for torch.export or ONNX.

    CHECKPOINT is what `adapt --out` wrote. The file needs nothing of this package and classifies any number of images,
    each by itself: a .pt2 is loaded by torch.export.load, an .onnx by ONNX Runtime and others. It says what to feed it:
    classes, sizes, mean and std, as JSON under "lambda_maml.json" (extra_files of a .pt2, metadata of an .onnx).
    """
    import torch

    from .export import check_name

    check_name(out)
    learner, adapted, dataset = _adapted(checkpoint, "cpu")
    dtype = next(learner.parameters()).dtype
    learner.export(
        out, classes=adapted["classes"], mean=dataset["mean"], std=dataset["std"], invert=adapted["invert"],
        normalise=normalise, example=torch.zeros(2, *adapted["images"], dtype=dtype),
    )  # fmt: skip
    say(f"wrote {out}")
    if as_json:
        print_json({"file": str(out), "classes": adapted["classes"], "images": adapted["images"]})


def _adapted(path: Path, device: str) -> tuple[Learner, dict[str, Any], dict[str, Any]]:
    """The learner of an adapted checkpoint, what `adapt` said of it, and the data that it was trained on."""
    from . import checkpoint
    from .learner import learner_of

    where = device_of(device)
    model, meta = checkpoint.load(path)
    if "images" not in meta.get("adapted", {}):
        raise ValueError(
            f"{path}: is not adapted to classes yet: lambda-maml adapt {path} --support FOLDER --out "
            "adapted.safetensors writes a checkpoint that is"
        )
    return learner_of(model.to(where)), meta["adapted"], meta["dataset"]


def _classifier(path: Path, device: str) -> tuple[list[str], Callable[[Sequence[Path]], Tensor]]:
    """The classes of an adapted network, and what gives the logits [n, ways] of files by it."""
    import torch

    from .images import read_images
    from .onnx_file import OnnxFile

    if path.suffix == ".onnx":
        if device_of(device).type != "cpu":
            raise ValueError(
                f"{path}: an .onnx is run on the CPU, not on {device}: give the .safetensors, or leave it out"
            )
        served = OnnxFile(path)
        return served.classes, served.classify
    if path.suffix == ".pt2":
        raise ValueError(
            f"{path}: torch.export.load unpickles what is in such a file, so that it could run anything: load it in a "
            "program of yours, or give the .safetensors or an .onnx"
        )
    learner, adapted, dataset = _adapted(path, device)

    def classify(files: Sequence[Path]) -> Tensor:
        images = read_images(files, adapted["images"], dataset, invert=adapted["invert"])
        with torch.no_grad():
            logits: Tensor = learner(images.to(device, next(learner.parameters()).dtype))
        return logits.cpu()

    return adapted["classes"], classify
