"""lambda_maml.data.glyphs: the set that the package carries, and the renderer that it was drawn by."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from lambda_maml import data
from lambda_maml.data import glyphs

SPLITS = ("train", "val", "test")
RNG = np.random.default_rng(0)


def _renderer() -> Any:
    """python/make_glyphs.py, which no wheel holds."""
    path = Path(__file__).parents[1] / "python" / "make_glyphs.py"
    spec = importlib.util.spec_from_file_location("make_glyphs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_glyphs"] = module
    spec.loader.exec_module(module)
    return module


make_glyphs = _renderer()


@pytest.fixture(scope="module")
def glyph_arrays():
    return glyphs.stored()


def test_glyphs_are_the_reference_set(glyph_arrays):
    images, codes = glyph_arrays
    sha = hashlib.sha256(codes.astype("<i4").tobytes() + images.tobytes()).hexdigest()
    assert sha == "f56854910608a4fb07b3a1d68224c59899bf5571ca0f65fa80cc1c3970eaae40" == glyphs.DIGEST
    assert make_glyphs.fonts_digest() == make_glyphs.FONTS_DIGEST


def test_glyphs_have_many_classes_of_many_scripts():
    sets = {split: data.load("glyphs", split=split) for split in SPLITS}
    assert {s: d.num_classes for s, d in sets.items()} == {"train": 675, "val": 169, "test": 211}
    for dataset in sets.values():
        assert dataset.image_shape == (1, 28, 28) and set(dataset.counts) == {20}
        assert len({name.split("/")[0] for name in dataset.class_names}) >= 20


def test_glyph_splits_share_no_character():
    names = [data.load("glyphs", split=split).class_names for split in SPLITS]
    assert len(set().union(*names)) == sum(map(len, names)) == 1055


def test_glyph_images_are_distinct_ink_on_black(glyph_arrays):
    images, _ = glyph_arrays
    ink = images.reshape(len(images), 20, -1)
    assert (ink.max(2) >= 128).all() and (ink.mean(2) < 128).all() and (ink.mean(2) > 4).all()
    assert len({image.tobytes() for image in images.reshape(-1, 28, 28)}) == images.shape[0] * 20
    assert 0.02 < np.isin(images, (0, 255), invert=True).mean() < 0.4  # antialiased edges


@pytest.mark.parametrize("alike", ["AΑАᎪ", "OΟОՕ", "oοоօ", "xхх", "BΒВ", "HΗН", "PΡРᑭ", "jјϳ", "sѕ", "-−–", "∑Σ", "∆Δ"])
def test_glyphs_keep_one_of_the_characters_that_look_alike(glyph_arrays, alike):
    assert len({ord(c) for c in alike} & set(glyph_arrays[1].tolist())) <= 1


def test_no_two_glyph_classes_share_an_outline(glyph_arrays):
    from fontTools.ttLib import TTFont

    codes = glyph_arrays[1].tolist()
    for face in make_glyphs.FACES:
        font = TTFont(make_glyphs.font_file(face))
        here = [c for c in codes if c in font.getBestCmap() and not (face.startswith("cm") and c > 127)]
        edges, starts = make_glyphs.read_outlines(font, here)
        seen = [edges[a:b].tobytes() for a, b in zip(starts[:-1], starts[1:])]
        assert len(set(seen)) == len(here) > 20


def test_no_two_glyph_classes_look_the_same(glyph_arrays):
    """The correlation of two classes' mean images; identical characters come to 0.98 and above."""
    mean = glyph_arrays[0].astype(np.float64).mean(1).reshape(len(glyph_arrays[0]), -1)
    between = np.corrcoef(mean)
    np.fill_diagonal(between, -1)
    assert between.max() < 0.97


def test_distinct_drops_what_looks_alike_in_any_pair_of_faces():
    noise = (RNG.random((4, 28, 28)) > 0.5).astype(np.uint8) * 16
    bitmaps = np.stack([noise[0], noise[1], noise[2], noise[1], noise[3]])
    assert make_glyphs.distinct(bitmaps, np.array([3, 3, 5, 7, 8])) == [3, 5, 8]


def square(x0, y0, x1, y1, clockwise=True):
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)][:: 1 if clockwise else -1]
    return [(*a, *b) for a, b in zip(corners, corners[1:] + corners[:1])]


def draw(edges, stroke=0):
    """Rasterise with one outline unit a sample unit."""
    one = np.array([[[make_glyphs._ONE, 0], [0, make_glyphs._ONE]]])
    outlines = make_glyphs.Outlines(np.array(edges), np.array([0, len(edges)]))
    zero = np.zeros((1, 2), dtype=np.int64)
    return make_glyphs.rasterise(outlines, np.zeros(1, dtype=np.int64), one, zero, zero, np.array([stroke]))[0]


def test_rasteriser_fills_by_the_nonzero_rule():
    pixel = make_glyphs._UNIT * make_glyphs._SUB
    big, small = square(-8 * pixel, -8 * pixel, 8 * pixel, 8 * pixel), (-4 * pixel, -4 * pixel, 4 * pixel, 4 * pixel)
    solid = np.zeros((28, 28), dtype=np.uint8)
    solid[6:22, 6:22] = 16
    ring = solid.copy()
    ring[10:18, 10:18] = 0
    assert (draw(big) == solid).all()
    assert (draw(big + square(*small)) == solid).all()
    assert (draw(big + square(*small, clockwise=False)) == ring).all()


def test_rasteriser_counts_samples_and_changes_strokes():
    pixel = make_glyphs._UNIT * make_glyphs._SUB
    half = square(-8 * pixel, -8 * pixel, 8 * pixel + pixel, 8 * pixel + pixel // 2)  # centred again: 17 x 16.5 pixels
    assert draw(half).sum() == 17 * 4 * 16.5 * 4
    assert draw(half, 1).sum() == 68 * 66 + 2 * (68 + 66)
    assert draw(half, -1).sum() == 66 * 64


def test_rasteriser_clips_at_the_border():
    huge = 40 * make_glyphs._UNIT * make_glyphs._SUB
    assert (draw(square(-huge, -huge, huge, huge)) == 16).all()


@pytest.mark.parametrize("character", "AgЖბש∮☃")
def test_outlines_agree_with_freetype(character):
    from fontTools.ttLib import TTFont

    path = make_glyphs.font_file("DejaVuSans")
    outlines = make_glyphs.read_outlines(TTFont(path), [ord(character)])
    ours = make_glyphs.canonical(outlines, np.zeros(1, dtype=np.int64))[0].astype(float)
    mask = ImageFont.truetype(str(path), 400).getmask(character)
    theirs = Image.frombytes("L", mask.size, bytes(mask))
    theirs = theirs.crop(theirs.getbbox())
    width, height = (round(n * 192 / max(theirs.size)) for n in theirs.size)
    sheet = Image.new("L", (224, 224))
    sheet.paste(theirs.resize((width, height), Image.Resampling.BOX), ((224 - width) // 2, (224 - height) // 2))
    want = np.asarray(sheet.reduce(8), dtype=float) * 16 / 255
    assert abs(ours - want).mean() < 0.35 and abs(ours - want).max() <= 6  # of 16


def test_a_missing_font_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no font file .*DejaVuSans\.ttf"):
        make_glyphs.render()


def _changed(images, codes):
    held = io.BytesIO()
    np.savez(held, images=images ^ 1, codes=codes)
    return lzma.compress(held.getvalue(), preset=0)


DAMAGES = {
    "cut short": (lambda whole: whole[: len(whole) // 2], "is damaged"),
    "a bit changed": (lambda whole: whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:], "is damaged"),
    "empty": (lambda whole: b"", "is damaged"),
    "not an archive": (lambda whole: lzma.compress(b"glyphs"), "is damaged"),
    "other pixels": (lambda whole: _changed(*glyphs.stored()), "is not the reference set"),
}


@pytest.mark.parametrize("damage, told", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_glyph_file_is_refused_with_the_remedy(tmp_path, monkeypatch, damage, told):
    path = tmp_path / "glyphs.npz.xz"
    path.write_bytes(damage(glyphs.FILE.read_bytes()))
    monkeypatch.setattr(glyphs, "FILE", path)
    with pytest.raises(ValueError, match=f"glyphs.npz.xz: the glyph set {told}.*install the package again"):
        glyphs.stored.__wrapped__()


def test_a_missing_glyph_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "FILE", tmp_path / "glyphs.npz.xz")
    with pytest.raises(FileNotFoundError, match="glyphs.npz.xz: the glyph set is not there: install"):
        glyphs.stored.__wrapped__()


def test_the_glyphs_are_drawn_again_with_the_same_pixels_on_other_cpu_features():
    """Without NumPy's vector code, and from the fonts that are installed."""
    code = (
        "import numpy as np, make_glyphs as made; from lambda_maml.data import glyphs;"
        "i, c = made.render(); print(glyphs.digest(i, np.array(c, np.int32)))"
    )
    features = "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": features, "OPENBLAS_NUM_THREADS": "1"}
    paths = [str(Path(__file__).parents[1] / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == glyphs.DIGEST, done.stderr
