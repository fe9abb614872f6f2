"""Augmentation of images: random crops, colour jitter, horizontal flips."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Augment"]

Pixels = NDArray[np.float32]

_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601-2, as PIL and torchvision have it
_ORDERS = np.array(list(permutations(range(3))))  # of brightness, contrast, saturation


@dataclass(frozen=True)
class Augment:
    """What is done to each image of a task, support and query, by draws of its own; as in MetaOptNet's training (Lee et
    al. 2019): crop, jitter, flip, in this order.

    crop: pad by so many black pixels on each side and cut the image's size out anywhere. jitter: brightness, contrast
    and saturation of colour images in random order, each by a factor from 1 - jitter to 1 + jitter. flip: left for
    right, every other time; not for letters, which it makes other letters.

    >>> augment = Augment(flip=True, crop=2, jitter=0.4)
    >>> augment(np.zeros((5, 8, 8, 3), np.uint8), augment.draws(np.random.PCG64(0), 5)).shape
    (5, 8, 8, 3)

    Raises:
        ValueError: crop is below 0, or jitter not in [0, 1].
    """

    flip: bool = False
    crop: int = 0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ValueError(f"crop is {self.crop}, expected at least 0 pixels")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter is {self.jitter}, expected from 0 to 1")

    def __bool__(self) -> bool:
        return self.flip or self.crop > 0 or self.jitter > 0

    def check(self, channels: int) -> None:
        """ValueError where images of so many channels cannot be changed so."""
        if self.jitter and channels != 3:
            raise ValueError(f"jitter is for colour images of 3 channels, these have {channels}: leave it out")

    @staticmethod
    def draws(bits: np.random.PCG64, images: int) -> NDArray[np.uint64]:
        """[images, 7]: the random words of each image; the same under every NumPy."""
        return np.asarray(bits.random_raw(images * 7), dtype=np.uint64).reshape(images, 7)

    def __call__(self, pixels: NDArray[np.uint8], draws: NDArray[np.uint64]) -> Pixels:
        """Images [n, H, W, channels] as float32 from 0 to 255, changed by the words [n, 7] of `draws`.

        Raises:
            ValueError: jitter is given and the images have no three channels.
        """
        self.check(pixels.shape[-1])
        x = pixels.astype(np.float32)
        if self.crop:
            x = self._cropped(x, draws[:, 0], draws[:, 1])
        if self.jitter:
            x = self._jittered(x, draws[:, 2:5], draws[:, 5])
        if self.flip:
            mirrored = draws[:, 6] % 2 == 1
            x[mirrored] = x[mirrored, :, ::-1]
        return x

    def _cropped(self, x: Pixels, down: NDArray[np.uint64], right: NDArray[np.uint64]) -> Pixels:
        height, width, pad = x.shape[1], x.shape[2], self.crop
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        places = zip((down % (2 * pad + 1)).tolist(), (right % (2 * pad + 1)).tolist())
        return np.stack([image[i : i + height, j : j + width] for image, (i, j) in zip(padded, places)])

    def _jittered(self, x: Pixels, words: NDArray[np.uint64], order: NDArray[np.uint64]) -> Pixels:
        share = (words >> np.uint64(11)).astype(np.float64) / 2**53  # [n, 3], in [0, 1)
        factors = (1 + self.jitter * (2 * share - 1)).astype(np.float32)
        steps = _ORDERS[order % len(_ORDERS)]  # [n, 3]
        for turn in range(3):
            for kind in range(3):
                own = steps[:, turn] == kind
                image = x[own]
                grey = image @ _GREY  # [n, H, W]
                other = (0.0, grey.mean(axis=(1, 2))[:, None, None, None], grey[..., None])[kind]
                factor = factors[own, kind][:, None, None, None]
                x[own] = np.clip(factor * image + (1 - factor) * other, 0, 255)
        return x
