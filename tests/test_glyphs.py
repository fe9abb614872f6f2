"""lambda_maml.data.glyphs: the set that is drawn on the spot, its rasteriser and its cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from lambda_maml import data
from lambda_maml.data import glyphs

SPLITS = ("train", "val", "test")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def glyph_cache(tmp_path_factory):
    """A folder with the drawn set in it."""
    folder = tmp_path_factory.mktemp("glyphs")
    data.load("glyphs", folder)
    return folder


@pytest.fixture(scope="module")
def glyph_arrays(glyph_cache):
    with np.load(next(glyph_cache.glob("*.npz"))) as file:
        return file["images"], file["codes"]


def test_glyphs_are_the_reference_set(glyph_arrays):
    images, codes = glyph_arrays
    sha = hashlib.sha256(codes.astype("<i4").tobytes() + images.tobytes()).hexdigest()
    assert sha == "f56854910608a4fb07b3a1d68224c59899bf5571ca0f65fa80cc1c3970eaae40" == glyphs.DIGEST
    assert glyphs.fonts_digest() == glyphs.FONTS_DIGEST


def test_glyphs_have_many_classes_of_many_scripts(glyph_cache):
    sets = {split: data.load("glyphs", glyph_cache, split) for split in SPLITS}
    assert {s: d.num_classes for s, d in sets.items()} == {"train": 675, "val": 169, "test": 211}
    for dataset in sets.values():
        assert dataset.image_shape == (1, 28, 28) and set(dataset.counts) == {20}
        assert len({name.split("/")[0] for name in dataset.class_names}) >= 20


def test_glyph_splits_share_no_character(glyph_cache):
    names = [data.load("glyphs", glyph_cache, split).class_names for split in SPLITS]
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
    for face in glyphs.FACES:
        font = TTFont(glyphs.font_file(face))
        here = [c for c in codes if c in font.getBestCmap() and not (face.startswith("cm") and c > 127)]
        edges, starts = glyphs.read_outlines(font, here)
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
    assert glyphs.distinct(bitmaps, np.array([3, 3, 5, 7, 8])) == [3, 5, 8]


def square(x0, y0, x1, y1, clockwise=True):
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)][:: 1 if clockwise else -1]
    return [(*a, *b) for a, b in zip(corners, corners[1:] + corners[:1])]


def draw(edges, stroke=0):
    """Rasterise with one outline unit a sample unit."""
    one = np.array([[[glyphs._ONE, 0], [0, glyphs._ONE]]])
    outlines = glyphs.Outlines(np.array(edges), np.array([0, len(edges)]))
    zero = np.zeros((1, 2), dtype=np.int64)
    return glyphs.rasterise(outlines, np.zeros(1, dtype=np.int64), one, zero, zero, np.array([stroke]))[0]


def test_rasteriser_fills_by_the_nonzero_rule():
    pixel = glyphs._UNIT * glyphs._SUB
    big, small = square(-8 * pixel, -8 * pixel, 8 * pixel, 8 * pixel), (-4 * pixel, -4 * pixel, 4 * pixel, 4 * pixel)
    solid = np.zeros((28, 28), dtype=np.uint8)
    solid[6:22, 6:22] = 16
    ring = solid.copy()
    ring[10:18, 10:18] = 0
    assert (draw(big) == solid).all()
    assert (draw(big + square(*small)) == solid).all()
    assert (draw(big + square(*small, clockwise=False)) == ring).all()


def test_rasteriser_counts_samples_and_changes_strokes():
    pixel = glyphs._UNIT * glyphs._SUB
    half = square(-8 * pixel, -8 * pixel, 8 * pixel + pixel, 8 * pixel + pixel // 2)  # centred again: 17 x 16.5 pixels
    assert draw(half).sum() == 17 * 4 * 16.5 * 4
    assert draw(half, 1).sum() == 68 * 66 + 2 * (68 + 66)
    assert draw(half, -1).sum() == 66 * 64


def test_rasteriser_clips_at_the_border():
    huge = 40 * glyphs._UNIT * glyphs._SUB
    assert (draw(square(-huge, -huge, huge, huge)) == 16).all()


@pytest.mark.parametrize("character", "AgЖბש∮☃")
def test_outlines_agree_with_freetype(character):
    from fontTools.ttLib import TTFont

    path = glyphs.font_file("DejaVuSans")
    outlines = glyphs.read_outlines(TTFont(path), [ord(character)])
    ours = glyphs.canonical(outlines, np.zeros(1, dtype=np.int64))[0].astype(float)
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
        data.load("glyphs", tmp_path)


DAMAGES = {
    "cut short": lambda b: b[: len(b) // 2],
    "a pixel changed": lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :],
    "empty": lambda b: b"",
    "not an archive": lambda b: b"glyphs" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_glyph_cache_is_drawn_anew(glyph_cache, glyph_arrays, tmp_path, monkeypatch, damage):
    sound = next(glyph_cache.glob("*.npz"))
    path = tmp_path / sound.name
    path.write_bytes(damage(sound.read_bytes()))
    calls = []
    monkeypatch.setattr(glyphs, "render", lambda: (calls.append(1), glyph_arrays[0], glyph_arrays[1].tolist())[1:])  # type: ignore[func-returns-value]
    want = data.load("glyphs", glyph_cache, "val")
    assert not calls
    assert np.array_equal(data.load("glyphs", tmp_path, "val").images, want.images) and len(calls) == 1
    assert np.array_equal(data.load("glyphs", tmp_path, "val").images, want.images) and len(calls) == 1
    assert [p.name for p in tmp_path.iterdir()] == [sound.name]


def test_a_cache_of_another_digest_is_drawn_anew(glyph_cache, glyph_arrays, tmp_path, monkeypatch):
    path = tmp_path / next(glyph_cache.glob("*.npz")).name
    np.savez(path, images=glyph_arrays[0] ^ 1, codes=glyph_arrays[1], digest=np.array(glyphs.DIGEST))
    monkeypatch.setattr(glyphs, "render", lambda: (glyph_arrays[0], glyph_arrays[1].tolist()))
    assert np.array_equal(data.load("glyphs", tmp_path).images, data.load("glyphs", glyph_cache).images)


def test_a_consistent_cache_of_other_content_is_seen(glyph_cache, glyph_arrays, tmp_path):
    path = tmp_path / next(glyph_cache.glob("*.npz")).name
    images, codes = glyph_arrays[0].copy(), glyph_arrays[1]
    images[0, 0, 0, 0] ^= 1
    np.savez(path, images=images, codes=codes, digest=np.array(glyphs.digest(images, codes)))
    with pytest.warns(UserWarning, match="not the reference set"):
        data.load("glyphs", tmp_path)


def test_glyphs_load_where_nothing_can_be_written(glyph_arrays, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(glyphs, "render", lambda: (glyph_arrays[0], glyph_arrays[1].tolist()))
    assert data.load("glyphs", tmp_path / "file" / "below").num_classes == 675


def test_glyph_draw_is_repeatable_on_other_cpu_features(glyph_arrays, tmp_path):
    """A second process with NumPy's vector code off draws the same pixels."""
    import subprocess
    import sys

    code = (
        "import sys, numpy as np; from lambda_maml.data import glyphs;"
        "i, c = glyphs.render(); print(glyphs.digest(i, np.array(c, np.int32)))"
    )
    features = "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": features, "OPENBLAS_NUM_THREADS": "1"}
    paths = [str(Path(data.__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == glyphs.DIGEST, done.stderr
