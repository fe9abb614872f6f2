"""Picture files and folders of them: bit depths, orientation, transparency, leftovers (data.pictures, images)."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lambda_maml import say
from lambda_maml.data import pictures
from lambda_maml.data.layout import visible
from lambda_maml.data.pictures import read_picture, shown
from lambda_maml.images import class_folders, image_files, query_files, read_images

GREY = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
RED = np.stack([GREY, GREY.T, GREY[::-1]], axis=-1)
SHAPE = (1, 16, 16)
PLAIN = {"mean": [0.0], "std": [1.0]}


def off(path: Path, want: np.ndarray, mode: str = "L") -> int:
    """The largest difference of the picture in a file from `want`."""
    got = read_picture(path, mode)  # type: ignore[arg-type]
    assert got.dtype == np.uint8 and got.shape == want.shape
    return int(abs(got.astype(int) - want).max())


DEPTHS = {
    "1-bit PNG": ("png", (GREY > 99), (GREY > 99) * 255),
    "8-bit PNG": ("png", GREY, GREY),
    "16-bit PNG": ("png", GREY.astype(np.uint16) * 257, GREY),
    "dark 16-bit PNG": ("png", GREY.astype(np.uint16), GREY * 0 + np.rint(GREY / 257).astype(np.uint8)),
    "1-bit TIFF": ("tif", (GREY > 99), (GREY > 99) * 255),
    "16-bit TIFF": ("tif", GREY.astype(np.uint16) * 257, GREY),
    "32-bit TIFF of 8-bit values": ("tif", GREY.astype(np.int32), GREY),
    "32-bit TIFF of 16-bit values": ("tif", GREY.astype(np.int32) * 257, GREY),
    "32-bit TIFF, whole range": ("tif", (GREY.astype(np.int64) * (2**31 - 1) // 255).astype(np.int32), GREY),
    "float TIFF in 0..1": ("tif", GREY.astype(np.float32) / 255, GREY),
    "float TIFF in 0..255": ("tif", GREY.astype(np.float32), GREY),
    "float TIFF in 0..65535": ("tif", GREY.astype(np.float32) * 257, GREY),
    "16-bit PGM": ("pgm", GREY.astype(np.int32) * 257, GREY),
}


@pytest.mark.parametrize(("ending", "stored", "want"), DEPTHS.values(), ids=DEPTHS)
def test_samples_of_any_depth_are_scaled_to_8_bits(tmp_path, ending, stored, want):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(stored).save(path)
    assert off(path, want) == 0
    assert off(path, np.stack([want] * 3, axis=-1), "RGB") == 0
    if ending != "pgm":
        one = read_images([path], SHAPE, PLAIN, invert=False)
        torch.testing.assert_close(one[0, 0], torch.from_numpy(np.asarray(want, np.float32) / 255))


def test_a_networks_settings_say_the_shape_too(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "x.png")
    config = {"network": "conv4", "in_channels": SHAPE[0], "image_size": list(SHAPE[1:])}
    one, two = (read_images([tmp_path / "x.png"], shape, PLAIN, invert=False) for shape in (SHAPE, config))
    assert torch.equal(one, two) and one.shape == (1, *SHAPE)
    with pytest.raises(ValueError, match="no image_size, so that images cannot be read for it"):
        read_images([tmp_path / "x.png"], {"network": "own", "in_channels": 1}, PLAIN, invert=False)


def tiff(bits: int, samples: bytes, photometric: int = 1, orientation: int = 1) -> bytes:
    """A one-strip grey 16x16 TIFF that Pillow does not write itself."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 0), (274, orientation), (277, 1)]
    tags += [(278, 16), (279, len(samples))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + samples


@pytest.mark.parametrize(("orientation", "back"), [(1, lambda x: x), (3, lambda x: x[::-1, ::-1])])
def test_12_bit_tiffs(tmp_path, orientation, back):
    values = np.arange(256).reshape(16, 16) * 16 + 15  # 15..4095
    bits = "".join(f"{v:012b}" for v in back(values).ravel())
    (tmp_path / "x.tif").write_bytes(tiff(12, int(bits, 2).to_bytes(len(bits) // 8, "big"), orientation=orientation))
    assert off(tmp_path / "x.tif", np.rint(values * 255 / 4095)) == 0


@pytest.mark.parametrize(("bits", "dtype", "scale"), [(8, "u1", 1), (16, "<u2", 257)])
def test_tiffs_whose_white_is_zero(tmp_path, bits, dtype, scale):
    (tmp_path / "x.tif").write_bytes(tiff(bits, (GREY.astype(dtype) * scale).astype(dtype).tobytes(), photometric=0))
    assert off(tmp_path / "x.tif", 255 - GREY) == 0


@pytest.mark.parametrize(
    ("mode", "ending", "near"),
    [
        ("RGB", "png", 0),
        ("RGBA", "png", 0),
        ("RGBA", "tif", 0),
        ("RGBA", "webp", 0),
        ("CMYK", "tif", 0),
        ("CMYK", "jpg", 12),
        ("YCbCr", "tif", 3),
        ("LAB", "tif", 20),  # 8 bits of L, a and b hold saturated colours coarsely
    ],
)
def test_colour_modes(tmp_path, mode, ending, near):
    smooth = np.asarray(Image.fromarray(RED).resize((16, 16), Image.Resampling.BOX).reduce(4).resize((16, 16)))
    more = {"lossless": True} if ending == "webp" else {"quality": 100, "subsampling": 0} if ending == "jpg" else {}
    Image.fromarray(smooth).convert(mode).save(tmp_path / f"x.{ending}", **more)
    assert off(tmp_path / f"x.{ending}", smooth, "RGB") <= near


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("ending", ["png", "gif", "tif", "bmp"])
def test_palettes(tmp_path, ending, mode):
    few = RED // 64 * 80
    Image.fromarray(few).quantize(64).save(tmp_path / f"x.{ending}")
    assert off(tmp_path / f"x.{ending}", np.asarray(Image.fromarray(few).convert(mode)), mode) == 0


NO_SEVEN = np.where(GREY == 7, 255, GREY)
CLEAR = np.tile(np.array([0, 255], np.uint8), (16, 8))
WHITE = np.where(CLEAR == 0, 255, GREY)
TRANSPARENT = {
    "LA": (lambda: Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(CLEAR))), {}, WHITE),
    "RGBA": (lambda: Image.merge("RGBA", [Image.fromarray(v) for v in (GREY, GREY, GREY, CLEAR)]), {}, WHITE),
    "one grey of 8 bits": (lambda: Image.fromarray(GREY), {"transparency": 7}, NO_SEVEN),
    "one grey of 16 bits": (lambda: Image.fromarray(GREY.astype(np.uint16) * 257), {"transparency": 7 * 257}, NO_SEVEN),
    "one colour": (lambda: Image.fromarray(GREY).convert("RGB"), {"transparency": (7, 7, 7)}, NO_SEVEN),
    "one of a palette": (lambda: Image.fromarray(GREY).convert("P"), {"transparency": 7}, NO_SEVEN),
}


@pytest.mark.parametrize(("make", "more", "want"), TRANSPARENT.values(), ids=TRANSPARENT)
def test_transparent_parts_are_white_as_paper(tmp_path, make, more, want):
    make().save(tmp_path / "x.png", **more)
    assert off(tmp_path / "x.png", want) == 0


# What a camera stores under an orientation, from the upright picture.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


MORE: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "packed.tif": {"compression": "tiff_lzw"}}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        *(("grey", ending) for ending in ("png", "tif", "packed.tif", "webp", "jpg")),
        *(("RGB", ending) for ending in ("png", "tif", "webp", "jpg")),
        *(("grey of 16 bits", ending) for ending in ("png", "tif")),
        *(("palette", ending) for ending in ("png", "tif")),
    ],
)
def test_pictures_are_turned_as_viewers_show_them(tmp_path, kind, ending, orientation):
    upright = GREY[:12] if kind != "RGB" else RED[:12]
    stored = np.ascontiguousarray(STORED[orientation](upright))
    if kind == "grey of 16 bits":
        stored = stored.astype(np.uint16) * 257
    picture = Image.fromarray(stored)
    if kind == "palette":
        picture = picture.convert("P")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    picture.save(path, exif=exif, **MORE.get(ending, {}))
    assert off(path, upright, "RGB" if kind == "RGB" else "L") <= (70 if ending == "jpg" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0", b"garbage", b"II*\0"])
def test_damaged_exif_leaves_the_picture_as_it_lies(tmp_path, exif):
    Image.fromarray(GREY).save(tmp_path / "x.jpg", exif=b"Exif\0\0" + exif, quality=100)
    assert off(tmp_path / "x.jpg", GREY) <= 3


@pytest.mark.parametrize(
    ("values", "message"),
    [([[np.nan, 1]], "from nan to nan"), ([[-1, 1]], "from -1 to 1"), ([[0, 1e9]], r"from 0 to 1e\+09")],
)
def test_samples_that_are_no_brightness_are_refused(tmp_path, values, message):
    Image.fromarray(np.array(values, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"x.tif: not a readable image: its samples range {message}; save it with"):
        read_picture(tmp_path / "x.tif", "L")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty: copy or download it again"),
        (b"<!DOCTYPE html><title>404", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"hello world", "its format is unknown; copy it again or remove it"),
    ],
)
def test_a_file_that_is_no_picture_is_named_with_the_remedy(tmp_path, content, message):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.png: not a readable image: .*{message}"):
        read_images([tmp_path / "x.png"], SHAPE, PLAIN, invert=True)


def test_images_are_resized_normalised_and_inverted(tmp_path):
    Image.fromarray(RED).resize((32, 48)).save(tmp_path / "x.png")
    dataset = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    got = read_images([tmp_path / "x.png"] * 2, (3, 20, 20), dataset, invert=True)
    with Image.open(tmp_path / "x.png") as image:
        small = 255 - np.asarray(image.resize((20, 20), Image.Resampling.LANCZOS))
    want = (torch.from_numpy(small) / 255 - torch.tensor(dataset["mean"])) / torch.tensor(dataset["std"])
    assert got.shape == (2, 3, 20, 20) and got.is_contiguous()
    torch.testing.assert_close(got[1], want.permute(2, 0, 1))


LEFTOVERS = [
    ".DS_Store", "._1.png", ".AppleDouble", "__MACOSX", "Icon\r",
    "Thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.ini", "$RECYCLE.BIN", "System Volume Information",
    "@eaDir", "#recycle", ".ipynb_checkpoints", "lost+found",
]  # fmt: skip


def test_leftovers_of_systems_are_not_visible(tmp_path):
    for name in LEFTOVERS:
        (tmp_path / name).mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    assert [path.name for path in visible(tmp_path)] == ["a.png", "b"]


def test_folders_of_classes_and_of_queries(tmp_path):
    for name in ("beta", "alpha"):
        (tmp_path / name).mkdir()
        Image.fromarray(GREY).save(tmp_path / name / "2.PNG")
        Image.fromarray(GREY).save(tmp_path / name / "1.jpg")
        (tmp_path / name / "notes.txt").write_text("")
        (tmp_path / name / "3.png").mkdir()
        for leftover in LEFTOVERS:
            if leftover.startswith("._"):
                (tmp_path / name / leftover).write_bytes(b"\0\5\26\7")
            else:
                (tmp_path / name / leftover).mkdir()
                Image.fromarray(GREY).save(tmp_path / name / leftover / "1.png")
                (tmp_path / leftover).mkdir(exist_ok=True)
    (tmp_path / "._1.png").write_bytes(b"\0\5\26\7")
    Image.fromarray(GREY).save(tmp_path / "top.png")
    alpha, beta = ([tmp_path / name / file for file in ("1.jpg", "2.PNG")] for name in ("alpha", "beta"))
    assert class_folders(tmp_path) == {"alpha": alpha, "beta": beta}
    assert query_files(tmp_path) == [tmp_path / "top.png", *alpha, *beta]
    assert image_files(tmp_path) == [tmp_path / "top.png"]


def test_folders_without_images_are_named(tmp_path):
    for ask in (class_folders, query_files):
        with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
            ask(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no image in this folder"):
        query_files(tmp_path)
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "1.heic").write_text("")
    with pytest.raises(ValueError, match="alpha: no image in this class folder, but 1.heic .*known endings: .png"):
        class_folders(tmp_path)


def test_pictures_of_kinds_that_are_not_read_are_said_once(tmp_path, caplog):
    say._said.clear()
    for name in ("1.png", "2.jfif", "3.ppm", "4.avif", "5.HEIC", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    for _ in range(2):
        assert [path.name for path in image_files(tmp_path)] == ["1.png", "2.jfif", "3.ppm"]
    (told,) = caplog.messages
    assert "left out 2 pictures, such as 4.avif: convert them to one of .png" in told
    with pytest.raises(FileNotFoundError, match="1.png: is a file: give its folder"):
        query_files(tmp_path / "1.png")


def test_a_picture_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"x.png: no such file"):
        read_picture(tmp_path / "x.png", "L")
    for ending in ("jpg", "jfif", "png", "ppm"):
        (tmp_path / f"y.{ending}").write_bytes(b"no picture at all")
        with pytest.raises(
            ValueError, match=rf"y.{ending}: not a readable image: its format is unknown; copy it again"
        ):
            read_picture(tmp_path / f"y.{ending}", "L")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ValueError, match=r"x.png: not a readable image: .*[Dd]irectory"):
        read_picture(tmp_path / "x.png", "RGB")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_large_jpeg_is_decoded_at_a_fraction_and_hardly_differs(tmp_path, mode, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    down, right = np.arange(640)[:, None, None] / 40, np.arange(800)[None, :, None] / 50
    waves = 128 + 90 * np.sin(down) * np.cos(right + np.arange(3))
    Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "x.jpg", exif=exif)
    sizes: list[tuple[int, int]] = []

    def noted(picture, *how):
        sizes.append(picture.size)
        return shown(picture, *how)

    monkeypatch.setattr(pictures, "shown", noted)
    got = read_picture(tmp_path / "x.jpg", mode, (30, 20))
    whole = read_picture(tmp_path / "x.jpg", mode)
    with Image.open(tmp_path / "x.jpg") as picture:
        want = shown(picture, mode, (30, 20))
    assert sizes == [(100, 80), (800, 640)] and whole.shape[:2] == (800, 640)
    assert abs(got.astype(int) - want).max() <= 2


def test_a_picture_is_opened_as_what_its_ending_names(tmp_path):
    """Pillow would hand PostScript to Ghostscript, whatever its name."""
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="not a readable image: it is a PostScript file"):
        read_picture(tmp_path / "x.png", "L")
    Image.fromarray(GREY).save(tmp_path / "y.png")
    (tmp_path / "y.png").rename(tmp_path / "y.jpg")
    with pytest.raises(ValueError, match="it is a PNG picture: let its name end in .png"):
        read_picture(tmp_path / "y.jpg", "L")
    (tmp_path / "z.xyz").write_bytes(b"P5 1 1 255 a")  # a PGM, if it were asked for
    with pytest.raises(ValueError, match="its format is unknown"):
        read_picture(tmp_path / "z.xyz", "L")


def test_a_pipe_is_no_picture_and_a_bomb_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="it is a pipe or a device"):
        read_picture(tmp_path / "x.png", "L")
    size = struct.pack(">IIBBBBB", 9500, 9500, 8, 0, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
    (tmp_path / "y.png").write_bytes(head + struct.pack(">I", 10) + b"IDAT" + bytes(14))
    with pytest.raises(ValueError, match="9500x9500|exceeds limit"):
        read_picture(tmp_path / "y.png", "L")
