"""Gray pictures side by side, on one scale. Read as their sizes and values."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lightlib.widgets.plots import Picture
from lightlib.widgets.style import WIDTH, new_figure, styled

NAME = 0.28  # inches above each picture
GAP = 0.12


def pictures(images: Mapping[str, Tensor], *, columns: int = 5) -> Picture:
    """{name: (rows, columns) in [-1, 1]}, so many in a row: -1 is black and 1 white, whatever the rest holds.

    Every picture is as wide as the others, however many pixels it has.

    >>> pictures({"dark": torch.full((32, 32), -0.5)})
    dark: 32 x 32, mean -0.5, from -0.5 to -0.5
    """
    if not images or any(image.dim() != 2 for image in images.values()):
        shapes = [tuple(image.shape) for image in images.values()]
        raise ValueError(f"pictures: give {{name: (rows, columns)}}, not {shapes}")
    columns = min(columns, len(images))
    rows, side = math.ceil(len(images) / columns), (WIDTH - GAP * (columns + 1)) / max(columns, 3)
    high = rows * (side + NAME + GAP)
    with styled():
        fig = new_figure((WIDTH, high))
        for i, (name, image) in enumerate(images.items()):
            left, above = GAP + i % columns * (side + GAP), NAME + i // columns * (side + NAME + GAP)
            ax = fig.add_axes((left / WIDTH, 1 - (above + side) / high, side / WIDTH, side / high))
            ax.imshow(image.detach().cpu().numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[], title=name)
    said = (
        f"{name}: {' x '.join(map(str, image.shape))}, mean {image.mean():.2g}, from {image.min():.2g} to "
        f"{image.max():.2g}"
        for name, image in images.items()
    )
    return Picture(fig, "; ".join(said))
