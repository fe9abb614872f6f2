"""Augmentation of images, against PIL image by image."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from small_runs import TRAIN, image_set, small

from lambda_maml import data, models
from lambda_maml.data import Augment
from lambda_maml.train import Settings, train

COLOUR, COLOUR_VAL = image_set("train", channels=3), image_set("val", channels=3)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 12, 9, 3)).astype(np.uint8)


def draws(seed: int = 0, images: int = 40) -> np.ndarray:
    return Augment.draws(np.random.PCG64(seed), images)


def test_crops_are_cut_out_of_padded_images_anywhere() -> None:
    found = Augment(crop=2)(PIXELS, draws())
    places = set()
    for image, own in zip(PIXELS, found):
        padded = Image.new("RGB", (13, 16))
        padded.paste(Image.fromarray(image), (2, 2))
        cuts = {(i, j): np.asarray(padded.crop((j, i, j + 9, i + 12))) for i in range(5) for j in range(5)}
        (place,) = [at for at, cut in cuts.items() if np.array_equal(cut, own)]
        places.add(place)
    assert {i for i, _ in places} == {j for _, j in places} == set(range(5))


def test_grey_images_are_cut_and_turned_as_colour_images_are() -> None:
    augment = Augment(flip=True, crop=2)
    assert np.array_equal(augment(PIXELS[..., :1], draws()), augment(PIXELS, draws())[..., :1])


def test_about_every_other_image_is_turned_left_for_right() -> None:
    found = Augment(flip=True)(PIXELS, draws())
    turned = [np.array_equal(own, image[:, ::-1]) for image, own in zip(PIXELS, found)]
    assert all(t or np.array_equal(own, image) for t, own, image in zip(turned, found, PIXELS))
    assert 10 < sum(turned) < 30


def test_jitter_is_that_of_pil_in_a_random_order() -> None:
    words, strength = draws(), 0.4
    found = Augment(jitter=strength)(PIXELS, words)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = set()
    for image, own, word in zip(PIXELS, found, words):
        factors = [1 + strength * (2 * (int(w) >> 11) / 2**53 - 1) for w in word[2:5]]
        order = list(permutations(range(3)))[int(word[5]) % 6]
        want = Image.fromarray(image)
        for kind in order:
            want = enhancers[kind](want).enhance(factors[kind])
        assert np.abs(np.asarray(want).astype(np.float32) - own).max() < 4  # PIL rounds after each change
        assert np.abs(image.astype(np.float32) - own).max() > 8
        orders.add(tuple(order))
    assert len(orders) == 6 and found.min() >= 0 and found.max() <= 255


def test_the_images_of_a_task_are_changed_by_its_own_draws() -> None:
    augment = Augment(flip=True, crop=2, jitter=0.4)
    options: dict[str, Any] = {"ways": 3, "shots": 2, "query": 2, "seed": 5, "augment": augment}
    three = data.sample_tasks(COLOUR, 3, **options)
    alone = data.sample_tasks(COLOUR, 1, first=2, **options)[0]
    assert all(torch.equal(a, b) for a, b in zip(three[2], alone))
    plain = data.sample_tasks(COLOUR, 3, **{**options, "augment": None})
    off = data.sample_tasks(COLOUR, 3, **{**options, "augment": Augment()})
    for task, one, other in zip(three, plain, off):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
        assert torch.equal(task.ys, one.ys) and torch.equal(task.yq, one.yq)
        assert all(not torch.equal(a, b) for a, b in zip([*task.xs, *task.xq], [*one.xs, *one.xq]))
    black = (0 - 0.5) / 0.2  # in tensors
    assert three[0].xs.min() >= black - 1e-5


@pytest.mark.usefixtures("one_thread")
def test_training_with_augmentation_resumes_to_the_same_bits(tmp_path: Path) -> None:
    settings = small(flip=True, crop=2, jitter=0.3)

    def run(folder: str, iterations: int, settings: Settings = settings, resume: bool = False) -> torch.nn.Module:
        torch.manual_seed(0)
        model = models.conv4(ways=3, in_channels=3, width=4, image_size=16)
        out = tmp_path / folder
        train(model, COLOUR, COLOUR_VAL, out=out, settings=settings, iterations=iterations, resume=resume)
        return model

    whole, plain = run("whole", 4), run("plain", 4, small())
    run("parts", 1)
    run("parts", 4, resume=True)
    run("whole", 4, resume=True)
    one, two = (torch.cat([p.flatten() for p in run(f, 4, resume=True).parameters()]) for f in ("whole", "parts"))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.cat([p.flatten() for p in plain.parameters()]))
    assert torch.equal(one, torch.cat([p.flatten() for p in whole.parameters()]))


def test_what_is_not_for_these_images_is_refused(tmp_path: Path) -> None:
    grey = models.conv4(ways=3, in_channels=1, width=4, image_size=16)
    with pytest.raises(ValueError, match="jitter is for colour images of 3 channels, these have 1: leave it out"):
        train(grey, TRAIN, TRAIN, out=tmp_path / "out", settings=small(jitter=0.1), iterations=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="these have 1"):
        data.sample_tasks(TRAIN, 1, ways=3, query=2, augment=Augment(jitter=0.1))
    with pytest.raises(ValueError, match="crop is -1, expected at least 0 pixels"):
        Settings(crop=-1)
    with pytest.raises(ValueError, match="jitter is 1.5, expected from 0 to 1"):
        Settings(jitter=1.5)
