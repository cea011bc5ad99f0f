"""Controls in rows that line up, and what each of them takes, in words."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as W

from lightlib.widgets.numbers import label


def arrange(controls: Mapping[str, W.ValueWidget], shown: list[W.ValueWidget]) -> None:
    """Columns that line up: every description as wide as the longest, none cut off."""
    for name, control in controls.items():
        control.description = control.description or label(name)
    widest = max((len(control.description) for control in shown), default=0)
    for control in shown:
        control.style.description_width = f"{7.2 * widest + 12:.0f}px"
        control.layout.width = control.layout.width or f"{7.2 * widest + max(196, inside(control)):.0f}px"
        control.layout.margin = "2px 18px 2px 0"


def inside(control: W.ValueWidget) -> float:
    """Pixels that the longest choice of a list takes, with its frame and arrow."""
    labels = control._options_labels if isinstance(control, W.Dropdown) else ()
    return 7.2 * max(map(len, labels), default=0) + 44


def choices(control: W.ValueWidget) -> str:
    """What a control takes, in words."""
    if hasattr(control, "options"):
        return "choose one of " + ", ".join(
            repr(o[1] if isinstance(o, tuple) else o) for o in control.options
        )
    if hasattr(control, "min"):
        return f"it goes from {control.min} to {control.max}"
    return f"it takes a {type(control.value).__name__}"
