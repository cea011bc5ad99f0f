"""What is to be represented: formulas of one coordinate, pictures of two, and how near a copy comes.

Coordinates lie in [-1, 1] at the centres of cells: of n cells, cell i is at -1 + (2 i + 1)/n. So the cells of
a grid twice as fine lie a quarter of a coarse cell to either side of its centre, and the pixels of a picture
of side 32 are means over four of side 64.
SSIM: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
"""

from __future__ import annotations

import functools
import io
import math
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightlib.fetch import FetchError, fetch, sha256, sources, supplied

PICTURES = ("camera", "astronaut", "coffee")
# files of the wheel's sample data, which may also lie in LIGHTLIB_DATA by themselves
MEMBERS = {
    "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "lfw_subset.npy": "9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c",
}
PEAK = 2.0  # values lie in [-1, 1]


@dataclass(frozen=True)
class Signal:
    """Coordinates x (points, inputs) in [-1, 1] and values y (points, outputs)."""

    x: Tensor
    y: Tensor


def grid(*sides: int) -> Tensor:
    """The centres of the cells of a grid, row by row: (product of sides, len(sides)).

    >>> grid(2).flatten()
    tensor([-0.5000,  0.5000])
    """
    if not sides or min(sides) < 1:
        raise ValueError(f"sides={sides}: give one or more numbers of cells, each at least 1")
    centres = [(2 * torch.arange(n) + 1) / n - 1 for n in sides]
    return torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).flatten(0, -2)


# of one coordinate
def chirp(points: int = 512, seed: int = 0) -> Signal:
    """Three sines of 3, 8 and 17 cycles and a chirp from 2 to 40 cycles a unit, t from 0 to 1 over [-1, 1].

    The sum of sin(2 pi f t + p) over the sines and of sin(2 pi (2 t + 19 t^2) + p), divided by its largest
    absolute value; the four phases p are drawn from the seed.
    """
    phases = 2 * math.pi * torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    t = (grid(points).double() + 1) / 2  # (points, 1)
    cycles = torch.cat([3 * t, 8 * t, 17 * t, 2 * t + 19 * t.square()], -1)  # (points, 4)
    return normalised(grid(points), torch.sin(2 * math.pi * cycles + phases))


def sound(points: int = 1000, seed: int = 0) -> Signal:
    """A sung vowel that dies away, its pitch falling from 120 to 100 Hz: 0.04 s, 24 harmonics.

    With t in seconds: exp(-25 t) times the sum over h of a(h) sin(2 pi h (120 t - 250 t^2) + p), divided by
    its largest absolute value. a(h) is the sum of 1/(1 + ((110 h - F)/B)^2)/h over the formants of an open a,
    (F, B) = (700, 110), (1220, 120) and (2600, 160) Hz; the phases p are drawn from the seed.
    """
    phases = 2 * math.pi * torch.rand(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h = torch.arange(1, 25, dtype=torch.float64)
    t = (grid(points).double() + 1) / 50  # (points, 1), seconds
    loud = sum(1 / (1 + ((110 * h - F) / B) ** 2) for F, B in ((700, 110), (1220, 120), (2600, 160))) / h
    turns = h * (120 * t - 250 * t.square())  # (points, 24)
    return normalised(grid(points), torch.exp(-25 * t) * loud * torch.sin(2 * math.pi * turns + phases))


def normalised(x: Tensor, parts: Tensor) -> Signal:
    """The sum of the parts (points, n), its largest absolute value 1."""
    y = parts.sum(-1, keepdim=True)
    return Signal(x, (y / y.abs().max()).float())


# pictures
def picture(name: str = "camera", side: int = 32) -> Tensor:
    """A gray picture (side, side) in [-1, 1]: "camera", "astronaut" or "coffee", of scikit-image's wheel.

    Cut to its middle square; each pixel is the mean of the area that it covers, whatever the side. The wheel
    (14 MB) is fetched once, and is not installed.
    """
    if name not in PICTURES:
        raise ValueError(f"no picture {name!r}: choose one of {', '.join(PICTURES)}")
    full = gray(name)
    if not 1 <= side <= len(full):
        raise ValueError(f"side={side}: {name} has {len(full)} pixels a side; give 1 to {len(full)}")
    A = averages(len(full), side)
    return (A @ full @ A.T).float()


def averages(n: int, m: int) -> Tensor:
    """(m, n): row i averages the cells of n that cell i of m covers, the partly covered by their share."""
    left, edge = torch.arange(m)[:, None] * n / m, torch.arange(n)[None].double()
    covered = torch.minimum(left + n / m, edge + 1) - torch.maximum(left, edge)
    return covered.clamp_min(0) * m / n


def as_signal(image: Tensor) -> Signal:
    """An image (rows, columns) as a function of (row, column): `y.view(image.shape)` is the image."""
    return Signal(grid(*image.shape), image.reshape(-1, 1))


def faces() -> Tensor:
    """200 pictures (200, 25, 25) in [-1, 1], 100 faces and then 100 that are none, of scikit-image's wheel.

    A subset of Labeled Faces in the Wild (Huang et al. 2007).
    """
    return torch.from_numpy(np.load(io.BytesIO(member("lfw_subset.npy")))).float() * PEAK - 1


@functools.cache
def gray(name: str) -> Tensor:
    """The middle square of a picture, in [-1, 1], float64; colours weighted as in Rec. 709."""
    try:
        from PIL import Image
    except ImportError as error:
        raise FetchError("pictures are read with Pillow; install lightlib's extra `lab`") from error
    with Image.open(io.BytesIO(member(f"{name}.png"))) as image:
        pixels = torch.from_numpy(np.array(image)).double()
    if pixels.dim() == 3:
        pixels = pixels[..., :3] @ torch.tensor([0.2125, 0.7154, 0.0721], dtype=torch.float64)
    side = min(pixels.shape)
    top, left = ((n - side) // 2 for n in pixels.shape)
    return pixels[top : top + side, left : left + side] / 127.5 - 1


def member(name: str) -> bytes:
    """A file of scikit-image's sample data: from LIGHTLIB_DATA, or out of the wheel."""
    if own := supplied(name):
        if sha256(own) != MEMBERS[name]:
            raise FetchError(f"{own}: its sha256 is not {MEMBERS[name]}; it is damaged or another file")
        return own.read_bytes()
    with zipfile.ZipFile(fetch(sources()["scikit-image"])) as wheel:
        return wheel.read(f"skimage/data/{name}")


# how near a copy comes
def psnr(image: Tensor, copy: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [-1, 1]: 10 log10(4 / MSE); inf for a perfect copy."""
    same_shape(image, copy)
    return (10 * torch.log10(PEAK**2 / (image.double() - copy.double()).square().mean())).item()


def ssim(image: Tensor, copy: Tensor) -> float:
    """Structural similarity of two images (rows, columns) in [-1, 1]: 1 where they are equal.

    The mean over all whole windows of 11 x 11, weighted as a Gaussian of deviation 1.5.
    """
    same_shape(image, copy)
    if image.dim() != 2 or min(image.shape) < 11:
        raise ValueError(f"images of {tuple(image.shape)}: SSIM takes two of at least 11 x 11 pixels")
    bell = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2
    a, b = image.double(), copy.double()
    stack = torch.stack([a, b, a * a, b * b, a * b])[:, None]  # (5, 1, rows, columns)
    m_a, m_b, aa, bb, ab = F.conv2d(stack, window.to(a.device)[None, None])[:, 0]
    C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    light = (2 * m_a * m_b + C1) / (m_a**2 + m_b**2 + C1)
    structure = (2 * (ab - m_a * m_b) + C2) / (aa - m_a**2 + bb - m_b**2 + C2)
    return (light * structure).mean().item()


def same_shape(image: Tensor, copy: Tensor) -> None:
    if image.shape != copy.shape:
        raise ValueError(f"the image is {tuple(image.shape)} and its copy {tuple(copy.shape)}")


def bicubic(image: Tensor, side: int) -> Tensor:
    """The image (rows, columns) at another size by bicubic interpolation of its pixels, on the same area."""
    return F.interpolate(image[None, None], (side, side), mode="bicubic", align_corners=False)[0, 0]
