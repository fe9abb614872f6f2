"""lambda_maml.data: the glyph set, the loaders of users' sets, the restricted unpickler, the episode sampler."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from lambda_maml import data
from lambda_maml.data import glyphs, pickles
from lambda_maml.data.imageset import with_rotations

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SPLITS = ("train", "val", "test")
RNG = np.random.default_rng(0)


# glyphs


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


# the sampler


def marked(counts, name="marked"):
    """A set whose image i of class k has the pixels (k, i)."""
    rows = [[[[k], [i]]] for k, n in enumerate(counts) for i in range(n)]
    images = np.array(rows, dtype=np.uint8).reshape(-1, 1, 2, 1)
    return data.ImageSet(name, "train", images, tuple(counts), tuple(f"c{k}" for k in range(len(counts))))


def marks(x):
    return [tuple(v) for v in torch.round(x.flatten(1) * 255).long().tolist()]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_tasks_are_what_the_definition_says(draws):
    ways, shots, query = draws.draw(st.integers(1, 6)), draws.draw(st.integers(1, 5)), draws.draw(st.integers(0, 6))
    counts = draws.draw(st.lists(st.integers(shots + query, shots + query + 9), min_size=ways, max_size=ways + 8))
    seed, first = draws.draw(st.integers(0, 2**70)), draws.draw(st.integers(0, 10**9))
    dataset = marked(counts)
    tasks = data.sample_tasks(dataset, 3, ways, shots, query, seed, first)
    for xs, ys, xq, yq in tasks:
        assert xs.dtype == xq.dtype == torch.float32 and ys.dtype == yq.dtype == torch.int64
        assert xs.shape == (ways * shots, 1, 1, 2) and xq.shape == (ways * query, 1, 1, 2)
        assert xs.is_contiguous() and xq.is_contiguous()
        assert ys.tolist() == [k for k in range(ways) for _ in range(shots)]
        assert yq.tolist() == [k for k in range(ways) for _ in range(query)]
        support, rest = marks(xs), marks(xq)
        assert len(set(support + rest)) == ways * (shots + query)
        classes = [support[k * shots][0] for k in range(ways)]
        assert len(set(classes)) == ways
        assert [c for c, _ in support] == [classes[k] for k in ys] and [c for c, _ in rest] == [classes[k] for k in yq]
    later = data.sample_tasks(dataset, 1, ways, shots, query, seed, first + 2)[0]
    assert all(torch.equal(a, b) for a, b in zip(later, tasks[2]))
    prefix = data.sample_tasks(dataset, 2, ways, shots, query, seed, first)
    assert all(torch.equal(a, b) for p, t in zip(prefix, tasks) for a, b in zip(p, t))


def test_draws_are_fixed_and_differ_by_seed_and_number():
    dataset = marked([9] * 30)

    def support(**arguments):
        return [marks(t.xs) for t in data.sample_tasks(dataset, 3, query=2, **arguments)]

    assert support(seed=5) == support(seed=5) != support(seed=6)
    assert len({str(s) for s in support(seed=5)}) == 3
    assert support(seed=5)[0] == PINNED


PINNED = [(25, 7), (9, 0), (26, 7), (12, 1), (28, 8)]  # (class, image) of the support set of task 0, seed 5


def test_every_class_and_image_is_drawn_about_equally_often():
    tasks = data.sample_tasks(marked([4] * 10), 2000, ways=5, shots=1, query=1, seed=1)
    drawn = np.array([m for t in tasks for m in marks(t.xs)])
    table = np.zeros((10, 4))
    np.add.at(table, (drawn[:, 0], drawn[:, 1]), 1)
    assert abs(table / 250 - 1).max() < 0.3  # 250 expected, standard deviation 15
    first_labels = np.bincount([marks(t.xs)[0][0] for t in tasks], minlength=10)
    assert abs(first_labels / 200 - 1).max() < 0.35  # labels do not follow the class order


def test_tasks_do_not_share_memory():
    a, b = data.sample_tasks(marked([9] * 5), 2, query=3)
    a.ys.fill_(7)
    a.xs.fill_(7)
    assert b.ys.max() < 5 and b.xs.max() < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 8}, r"8 ways, but marked train has 7 classes"),
        ({"shots": 5, "query": 15}, r"5 shots and 15 query .* 20 images a class, but class c6 of marked train has 19"),
        ({"ways": 0}, r"ways is 0, expected at least 1"),
        ({"shots": 0}, r"shots is 0"),
        ({"query": -1}, r"query is -1"),
        ({"n": -1}, r"n is -1"),
        ({"seed": -3}, r"seed is -3"),
        ({"first": -3}, r"first is -3"),
    ],
)
def test_sampler_refuses_with_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.sample_tasks(marked([20] * 6 + [19]), **{"n": 1, **arguments})


# image sets


def test_rgb_is_normalised_and_grey_is_not():
    rgb = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    dataset = data.ImageSet("x", "train", rgb, (6,), ("a",), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    want = (torch.from_numpy(rgb[[4, 1]]).double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(
        [0.1, 0.2, 0.3]
    )
    got = dataset.tensors(np.array([4, 1]))
    assert got.is_contiguous() and got.shape == (2, 3, 5, 4) == (2, *dataset.image_shape)
    torch.testing.assert_close(got, want.permute(0, 3, 1, 2).float())
    grey = data.ImageSet("x", "train", rgb[..., :1], (6,), ("a",)).tensors(np.arange(6))
    torch.testing.assert_close(grey[:, 0], torch.from_numpy(rgb[..., 0]) / 255)


def test_rotations_are_further_classes():
    images = RNG.integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    turned = with_rotations(data.ImageSet("x", "train", images, (2, 1), ("a", "b")))
    assert turned.counts == (2, 1) * 4 and turned.class_names[2:4] == ("a@90", "b@90")
    for k in range(4):
        assert np.array_equal(turned.images[3 * k + 2, ..., 0], np.rot90(images[2, ..., 0], k))
    with pytest.raises(ValueError, match="square"):
        with_rotations(data.ImageSet("x", "train", images[:, :2], (2, 1), ("a", "b")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 1), np.float32)}, "float32"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"\[2, 4, 4\]"),
        ({"counts": (3,)}, "add up to 3, but there are 2"),
        ({"counts": (2, 0), "class_names": ("a", "b")}, "at least one image"),
        ({"class_names": ("a", "b")}, "2 class names"),
        ({"std": (0.0,)}, "std above 0"),
    ],
)
def test_image_sets_that_do_not_fit_together(change, message):
    parts = {"images": np.zeros((2, 4, 4, 1), np.uint8), "counts": (2,), "class_names": ("a",)}
    with pytest.raises(ValueError, match=message):
        data.ImageSet("x", "train", **{**parts, **change})


def test_unknown_names_and_splits_list_the_choices(tmp_path):
    with pytest.raises(ValueError, match="'imagenet': choose from glyphs, omniglot, cifar_fs, fc100, mini_imagenet"):
        data.load("imagenet", tmp_path)
    with pytest.raises(ValueError, match="'valid': choose from train, val, test"):
        data.load("fc100", tmp_path, "valid")


@pytest.mark.parametrize("name", ["omniglot", "cifar-fs", "fc100", "mini-imagenet"])
def test_a_missing_root_names_the_layout(name, tmp_path):
    file = {"omniglot": r"images_background/<Alphabet>/characterNN", "cifar-fs": r"CIFAR_FS_\{train,val,test\}.pickle"}
    file |= {
        "fc100": r"FC100_\{train,val,test\}.pickle",
        "mini-imagenet": r"mini-imagenet-cache-\{train,val,test\}.pkl",
    }
    with pytest.raises(ValueError, match=f"root is not given.*{file[name]}"):
        data.load(name)
    with pytest.raises(FileNotFoundError, match=f"{file[name]}.*nowhere does not exist"):
        data.load(name, tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(FileNotFoundError, match=f"{file[name]}.* holds holiday.jpg"):
        data.load(name, tmp_path)


# pickled sets


def pixels(n, size=32):
    return RNG.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("below", ["", "cifar-fs"])
def test_cifar_fs_reads_unsorted_unbalanced_labels(tmp_path, protocol, below):
    x, labels = pixels(7), [9, 4, 9, 9, 61, 4, 9]
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    (folder / "CIFAR_FS_val.pickle").write_bytes(pickle.dumps({"data": x, "labels": labels}, protocol))
    dataset = data.load("cifar-fs", str(tmp_path), "val")
    assert dataset.class_names == ("4", "9", "61") and dataset.counts == (2, 4, 1)
    assert np.array_equal(dataset.images, x[[1, 5, 0, 2, 3, 6, 4]])
    mean, std = torch.tensor([0.5071, 0.4865, 0.4409]), torch.tensor([0.2673, 0.2564, 0.2762])
    want = (torch.from_numpy(x[1]).float() / 255 - mean) / std
    torch.testing.assert_close(dataset.tensors(np.array([0]))[0], want.permute(2, 0, 1))


def test_fc100_with_byte_keys_and_array_labels(tmp_path):
    x = pixels(4)
    content = OrderedDict({b"data": np.asfortranarray(x), b"labels": np.array([2, 2, 1, 1])})
    (tmp_path / "FC100_test.pickle").write_bytes(pickle.dumps(content, 2))
    assert np.array_equal(data.load("fc100", tmp_path, "test").images, x[[2, 3, 0, 1]])


@pytest.mark.parametrize("kind", ["uint8", "float255", "float1"])
@pytest.mark.parametrize("file", ["mini-imagenet-cache-val.pkl", "mini-imagenet-cache-validation.pkl"])
def test_mini_imagenet_class_dict(tmp_path, kind, file):
    x = pixels(5, 84)
    stored = {"uint8": x, "float255": x.astype(np.float32), "float1": x.astype(np.float64) / 255}[kind]
    classes = {"n02": [4, 0], b"n01": np.array([1, 2, 3])}
    (tmp_path / "mini-imagenet").mkdir()
    (tmp_path / "mini-imagenet" / file).write_bytes(pickle.dumps({"image_data": stored, "class_dict": classes}))
    dataset = data.load("mini_imagenet", tmp_path, "val")
    assert dataset.class_names == ("n02", "n01") and dataset.counts == (2, 3)
    assert np.array_equal(dataset.images, x[[4, 0, 1, 2, 3]])


def test_mini_imagenet_with_data_and_labels(tmp_path):
    x = pixels(3, 84)
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps({"data": x, "labels": ["b", "a", "b"]}))
    assert np.array_equal(data.load("mini-imagenet", tmp_path).images, x[[1, 0, 2]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a dict"),
        ({"images": 1}, r"keys \['images'\], expected data and labels"),
        (
            {"data": np.zeros((2, 84, 84, 3), np.uint8), "labels": [0, 1]},
            r"uint8 \[2, 84, 84, 3\], expected .* 32, 32, 3",
        ),
        ({"data": [1, 2], "labels": [0, 1]}, "images are list"),
        ({"data": np.zeros((2, 32, 32, 3), np.uint8), "labels": [0]}, r"\[1\], expected 2 numbers or names"),
        ({"data": np.zeros((2, 32, 32, 3), np.uint8), "labels": [0.5, 1]}, "labels are float64"),
        ({"data": np.full((2, 32, 32, 3), np.nan), "labels": [0, 1]}, "range from nan"),
        ({"data": np.full((2, 32, 32, 3), -1), "labels": [0, 1]}, "range from -1"),
        ({"data": np.zeros((0, 32, 32, 3), np.uint8), "labels": []}, "no image|labels are"),
        ({"image_data": pixels(2), "class_dict": {"a": [0, 2]}}, r"class a has indices 0..2, but there are 2"),
        ({"image_data": pixels(2), "class_dict": {"a": [0, 1], "b": [1]}}, r"image 1 is listed 2 times"),
        ({"image_data": pixels(2), "class_dict": {"a": []}}, "class a has"),
        ({"image_data": pixels(2), "class_dict": [0]}, "class_dict is a list"),
    ],
)
def test_wrong_content_is_named(tmp_path, content, message):
    path = tmp_path / "CIFAR_FS_train.pickle"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        data.load("cifar_fs", tmp_path)
    assert str(path) in str(error.value)


# the restricted unpickler


def roundtrip(tmp_path, value, protocol):
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps(value, protocol))
    return pickles.load(path)


ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.arange(6, dtype=">i4").reshape(2, 3),
    np.asfortranarray(np.arange(24, dtype=np.float64).reshape(2, 3, 4)),
    np.arange(24, dtype=np.int16).reshape(4, 6)[::2, 1::2],
    np.zeros((0, 3), np.float32),
    np.array(3.5),
    np.array([True, False]),
    np.array(["ab", "c"]),
    np.array([b"ab", b"c"]),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_come_back(tmp_path, protocol):
    for array in ARRAYS:
        got = roundtrip(tmp_path, {"a": [array]}, protocol)["a"][0]
        assert got.dtype == array.dtype and np.array_equal(got, array)
    plain = {
        "n": None,
        "t": (1, 2.5, True),
        b"b": [b"\x00\xff", "é", b""],
        3: {1, 2},
        "f": frozenset([1]),
        "big": 2**80,
    }
    assert roundtrip(tmp_path, plain, protocol) == plain
    scalars = roundtrip(tmp_path, [np.int64(7), np.float32(0.5), bytearray(b"xy")], protocol)
    assert scalars == [7, 0.5, b"xy"]


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_a_pickle_of_python_2_is_read(tmp_path, core):
    raw = bytes(range(250, 256))
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"c" + core + b".multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += b"(K\x01K\x02K\x03\x86" + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    (tmp_path / "x").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x04name" + b"U\x02n1u.")
    got = pickles.load(tmp_path / "x")
    assert got["name"] == "n1" and got["data"].dtype == np.uint8
    assert got["data"].tolist() == [[250, 251, 252], [253, 254, 255]]


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, protocol):
    marker = tmp_path / "owned"
    for call in (
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(open, str(marker), "w"),
    ):
        path = tmp_path / "FC100_train.pickle"
        path.write_bytes(pickle.dumps({"data": pixels(1), "labels": call}, protocol))
        with pytest.raises(ValueError, match=r"refused, it names \w+\.(system|eval|open)") as error:
            data.load("fc100", tmp_path)
        assert str(path) in str(error.value) and not marker.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([1, "x"], dtype=object), "object"),
        (np.array([(1, 2.0)], dtype="i4,f8"), "dtype 'V12'"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "dtype 'M8'"),
        (Call(np.load, "x"), "numpy.*load"),
        (Call(getattr, 1, "real"), "getattr"),
        (np.ma.zeros(2), "numpy.ma"),
        (Path("x"), "pathlib"),
    ],
    ids=["objects", "structured", "dates", "numpy.load", "getattr", "masked", "path"],
)
def test_other_globals_and_dtypes_are_refused(tmp_path, value, message):
    with pytest.raises(ValueError, match=f"refused.*{message}"):
        roundtrip(tmp_path, {"data": value}, 2)


DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00%s\x85R"
STREAMS = {
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", "names numpy.dtype.__init__"),
    "size": (
        b"\x80\x02cnumpy.core.numeric\n_frombuffer\n(U\x01a" + DTYPE % b"u1" + b"K\x09\x85U\x01CtR.",
        "in 1 bytes",
    ),
    "bytes by length": (
        b"\x80\x02cnumpy.core.numeric\n_frombuffer\n(K\x09" + DTYPE % b"u1" + b"K\x09\x85U\x01CtR.",
        "without dtype or bytes",
    ),
    "object by code": (b"\x80\x02" + DTYPE % b"O8" + b".", "refused.*objects"),
    "codec": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "refused.*hex"),
    "unfilled": (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.", "without content"),
    "dtype with fields": (
        b"\x80\x02" + DTYPE % b"u1" + b"(K\x03U\x01|NU\x01aU\x01bJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        "refused.*structured",
    ),
    "persistent id": (b"\x80\x02K\x01Q.", "not a sound pickle"),
    "text": (b"hello world", "not a sound pickle"),
    "empty": (b"", "not a sound pickle"),
}


@pytest.mark.parametrize(("stream", "message"), STREAMS.values(), ids=STREAMS)
def test_crafted_streams(tmp_path, stream, message):
    (tmp_path / "x").write_bytes(stream)
    with pytest.raises(ValueError, match=message):
        pickles.load(tmp_path / "x")


def test_a_stream_cannot_alter_what_the_next_load_uses(tmp_path):
    # BUILD with a slot state on the global _reconstruct sets an attribute on it
    (tmp_path / "x").write_bytes(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x01aK\x07s\x86b.")
    pickles.load(tmp_path / "x")
    assert not hasattr(pickles._reconstruct, "a")


def test_a_truncated_pickle_is_refused(tmp_path):
    whole = pickle.dumps({"data": pixels(3), "labels": [0, 1, 2]}, 2)
    path = tmp_path / "CIFAR_FS_train.pickle"
    for keep in (1, 20, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"CIFAR_FS_train.pickle: not a sound pickle .* cut short"):
            data.load("cifar_fs", tmp_path)


# Omniglot


def character(folder, n, size=105):
    folder.mkdir(parents=True)
    for i in range(n):
        image = np.where(RNG.random((size, size)) > 0.9, 0, 255).astype(np.uint8)
        Image.fromarray(image).convert("1").save(folder / f"0001_{i + 1:02}.png")


@pytest.fixture
def omniglot_folder(tmp_path):
    home = tmp_path / "omniglot-py"
    for k in range(1, 15):
        character(home / "images_background" / f"Script{k % 3}" / f"character{k:02}", 2 + k % 2)
    for k in range(1, 4):
        character(home / "images_evaluation" / "Other" / f"character{k:02}", 2)
    (home / "images_background" / ".DS_Store").write_text("")
    (home / "images_evaluation" / "Other" / "character01" / "Thumbs.db").write_text("")
    return tmp_path


def test_omniglot_without_split_files(omniglot_folder):
    sets = {split: data.load("omniglot", omniglot_folder, split, rotations=False) for split in SPLITS}
    assert {s: d.num_classes for s, d in sets.items()} == {"train": 12, "val": 2, "test": 3}
    names = {split: set(dataset.class_names) for split, dataset in sets.items()}
    assert not names["train"] & names["val"] and all(n.startswith("images_evaluation/Other/") for n in names["test"])
    assert set(sets["train"].counts) == {2, 3}
    direct = data.load("omniglot", omniglot_folder / "omniglot-py", "val")
    assert direct.class_names == sets["val"].class_names and np.array_equal(direct.images, sets["val"].images)


def test_omniglot_with_split_files_and_rotations(omniglot_folder):
    splits = omniglot_folder / "omniglot-py" / "splits" / "vinyals"
    splits.mkdir(parents=True)
    for split, name in (
        ("train", "images_evaluation/Other/character02"),
        ("val", "images_background/Script0/character03"),
    ):
        (splits / f"{split}.txt").write_text(name + "\n\n")
    train = data.load("omniglot", omniglot_folder)
    assert train.class_names[0] == "images_evaluation/Other/character02" and train.num_classes == 4
    assert np.array_equal(train.images[2, ..., 0], np.rot90(train.images[0, ..., 0]))
    assert data.load("omniglot", omniglot_folder, "val").num_classes == 1
    assert data.load("omniglot", omniglot_folder, "val", rotations=True).num_classes == 4
    (splits / "test.txt").write_text("images_evaluation/Other/character02\nimages_evaluation/Lost/character01\n")
    with pytest.raises(FileNotFoundError, match=r"lists 2 classes, of which 1 have no folder.*Lost"):
        data.load("omniglot", omniglot_folder, "test")


def test_omniglot_names_an_unreadable_image(omniglot_folder):
    path = omniglot_folder / "omniglot-py" / "images_evaluation" / "Other" / "character02" / "0001_02.png"
    whole = path.read_bytes()
    for broken in (b"", b"not a picture", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"unreadable image .*character02.0001_02\.png"):
            data.load("omniglot", omniglot_folder, "test")


def test_omniglot_names_a_class_without_images_and_a_missing_part(omniglot_folder):
    home = omniglot_folder / "omniglot-py"
    (home / "images_evaluation" / "Other" / "character09").mkdir()
    with pytest.raises(ValueError, match="no PNG in .*character09"):
        data.load("omniglot", omniglot_folder, "test")
    shutil.rmtree(home / "images_evaluation")
    with pytest.raises(FileNotFoundError, match="no images_evaluation for split 'test'.* holds images_background/"):
        data.load("omniglot", omniglot_folder, "test")


def test_real_omniglot_equals_the_packed_images(tmp_path):
    archive, packed = SHARED / "omniglot" / "images_background_small1.zip", SHARED / "omniglot.npz"
    if not (archive.is_file() and packed.is_file()):
        pytest.skip("the real Omniglot files (../shared/data/omniglot) are not here")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    (tmp_path / "images_background_small1").rename(tmp_path / "images_background")
    with np.load(packed) as file:
        table = {
            key: file[key] for key in ("images", "class_background", "class_alphabet", "class_character", "alphabets")
        }
    index = {
        f"images_background/{table['alphabets'][a]}/{c}": k
        for k, (b, a, c) in enumerate(zip(table["class_background"], table["class_alphabet"], table["class_character"]))
        if b
    }
    classes = 0
    for split in ("train", "val"):
        dataset = data.load("omniglot", tmp_path, split, rotations=False)
        assert set(dataset.counts) == {20}
        for k, name in enumerate(dataset.class_names):
            want = table["images"][20 * index[name] : 20 * index[name] + 20]
            assert np.array_equal(dataset.images[20 * k : 20 * k + 20, ..., 0], want), name
        classes += dataset.num_classes
    assert classes == 136
