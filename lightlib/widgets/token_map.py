"""Token map: a layer's inputs, tokens by channels, where an outlier is a line or a dot."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightlib.widgets.logarithm import exponents
from lightlib.widgets.plots import Picture
from lightlib.widgets.style import HEAT, WIDTH, new_figure, panels, styled


def token_map(inputs: Mapping[str, Tensor], *, around: Mapping[str, int], wide: int = 24) -> Picture:
    """|x| of every token in the `wide` channels around one, each panel on a logarithmic colour scale.

    inputs: {title: (tokens, in)}; around: {title: channel}. A channel that is always large shows as a column,
    one token's activation as a dot.
    """
    if not inputs:
        raise ValueError("token_map: there is nothing to draw; give {title: inputs (tokens, channels)}")
    cuts, said = {}, []
    for title, X in inputs.items():
        X = X.detach().float().cpu().abs()
        start = max(0, min(around[title] - wide // 2, X.shape[1] - wide))
        cuts[title] = start, X[:, start : start + wide]
        one = X[:, around[title]]
        said.append(
            f"{title}: channel {around[title]} has median {one.median():.3g}, largest {one.max():,.4g} "
            f"(token {int(one.argmax())}); {int((one >= 6).sum())} of {len(X)} tokens reach 6"
        )
    with styled():
        fig = new_figure((WIDTH, 3.6))
        axes = panels(fig, [1] * len(cuts), [0.7] + [0.6] * (len(cuts) - 1), bottom=0.6)
        for ax, (title, (start, part)) in zip(axes, cuts.items(), strict=True):
            low, high = part.median().item() / 3, part.max().item()
            dark, bright = exponents([low, high])
            extent = (start, start + part.shape[1], len(part), 0)
            ax.imshow(exponents(part), cmap=HEAT, aspect="auto", vmin=dark, vmax=bright, extent=extent)
            ax.set(xlabel="input channel", title=f"{title} (bright: {high:,.4g})")
        axes[0].set_ylabel("token")
    return Picture(fig, f"|x|: {'; '.join(said)}")
