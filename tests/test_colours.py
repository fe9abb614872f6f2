"""Pictures for all eyes: the colours of the drawn pictures differ for colour-blind ones and on both pages."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lambda_maml import report

DRAWN = sorted((Path(__file__).resolve().parents[1] / "docs").glob("demo*.svg"))
# What linear sRGB becomes where a kind of cones is missing: Machado, Oliveira, Fernandes 2009, table 1.
EYES = {
    "all cones": np.eye(3),
    "no long ones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no middle ones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no short ones": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
GREY = "#8c8c8c"  # matplotlib's 0.55
# What is drawn, and the page that it is drawn on.
LIGHT = (report.BLUE, report.GREEN, report.VERMILION, GREY, "#000000"), "#ffffff"
DARK = (report.SKY, report.GREEN, report.VERMILION, GREY, "#ffffff"), "#14181f"
APART = 8.0  # of CIE 1976, in which 2.3 is just noticed
MARK = 3.0  # WCAG 2.2, 1.4.11: contrast of what is no text


def linear(colour: str) -> NDArray[np.float64]:
    values = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def seen(colour: str, eyes: str) -> NDArray[np.float64]:
    """The colour in CIE 1976 L*a*b*, under D65."""
    xyz = XYZ @ np.clip(EYES[eyes] @ linear(colour), 0, 1) / (XYZ @ np.ones(3))
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    dark, light = sorted(float((XYZ @ linear(colour))[1]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize(("colours", "page"), [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_told_apart(eyes: str, colours: tuple[str, ...], page: str) -> None:
    near = {(a, b): float(np.linalg.norm(seen(a, eyes) - seen(b, eyes))) for a, b in itertools.combinations(colours, 2)}
    assert min(near.values()) > APART, min(near, key=lambda pair: near[pair])
    assert all(contrast(colour, page) > MARK for colour in colours)


def test_the_pictures_of_the_first_page_are_drawn_in_them() -> None:
    assert len(DRAWN) == 2
    for path, (colours, page) in zip(DRAWN, (DARK, LIGHT), strict=True):
        lines = {"#e6e6e6", "#b0b0b0", "#808080", "#ffffff", "#000000"}  # axes, grid, leaders, edges
        assert set(re.findall("#[0-9a-f]{6}", path.read_text())) <= {*colours, page, *lines}


def test_red_and_green_of_a_traffic_light_are_not() -> None:
    assert np.linalg.norm(seen("#a06000", "no middle ones") - seen("#608000", "no middle ones")) < APART
