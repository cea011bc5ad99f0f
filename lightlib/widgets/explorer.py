"""Explorer: controls on top, numbers in the middle, a picture below.

`compute` is pure, so each setting is computed and drawn once, on a Figure that pyplot knows nothing about.
"""

from __future__ import annotations

import base64
import contextlib
import html
from collections import OrderedDict
from collections.abc import Callable, Mapping

import ipywidgets as W
from traitlets import TraitError

from lightlib.widgets.controls import arrange, choices
from lightlib.widgets.numbers import label, say, shown, table
from lightlib.widgets.style import WIDTH, new_figure, png, small_png, styled

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
CUSTOM = "(your own)"


class Explorer(W.VBox):
    """Live controls over a pure function. Use it from code with `.set(bits=3).result["error"]`.

    compute(**controls) -> mapping; its numbers and words are shown, `says` as a sentence, all else is not
    draw(fig, result)   -> draws that mapping on a new matplotlib Figure of `size` inches
    presets             -> {name: {control: value}}; choosing one sets these controls
    settle(controls)    -> where one control decides what another may be, puts that other right
    """

    def __init__(
        self,
        compute: Callable[..., Mapping],
        draw: Callable | None = None,
        *,
        name: str = "Explorer",
        size: tuple[float, float] = (WIDTH, 3.0),
        cache: int = 256,
        presets: Mapping[str, Mapping] | None = None,
        settle: Callable[[Mapping[str, W.ValueWidget]], None] | None = None,
        **controls: W.ValueWidget,
    ):
        self._compute, self._draw, self._name, self._size, self._keep = compute, draw, name, size, cache
        self._frames: OrderedDict[tuple, tuple[Mapping, bytes, str]] = OrderedDict()
        self._held, self._settle = False, settle or (lambda controls: None)
        self.controls = controls
        self.presets = dict(presets or {})
        self.renders = 0
        self._preset = W.Dropdown(options=[*self.presets, CUSTOM], value=CUSTOM, description="preset")
        self._numbers = W.HTML(layout=W.Layout(margin="4px 2px"))
        self._picture = W.Image(format="png", layout=W.Layout(max_width="100%", align_self="flex-start"))
        self._refresh()
        visible = [self._preset, *controls.values()] if self.presets else [*controls.values()]
        arrange(controls, visible)
        row = W.Box(visible, layout=W.Layout(display="flex", flex_flow="row wrap", width="100%"))
        super().__init__([row, self._numbers] + ([self._picture] if draw else []))
        self.add_class("light-explorer")
        for control in controls.values():
            control.observe(self._on_change, names="value")
        self._preset.observe(self._on_preset, names="value")

    # what runs when a control moves
    def _on_change(self, _change) -> None:
        if not self._held:
            with self._told():
                with self._holding():
                    self._settle(self.controls)
                self._refresh()

    def _on_preset(self, change) -> None:
        if change["new"] in self.presets and not self._held:
            with self._told():
                self.set(preset=change["new"])

    @contextlib.contextmanager
    def _told(self):
        """Show an error where the numbers are: a callback's traceback would reach no reader."""
        try:
            yield
        except Exception as error:
            self._numbers.value = (
                f"<div role='alert' style='line-height:1.5'>&#9888; {html.escape(str(error))}</div>"
            )

    def _refresh(self) -> None:
        self.result, self._png, table = self._frame(self.values)
        with self.hold_sync(), self._holding():
            self._numbers.value, self._picture.value = table, self._png
            matching = (
                n for n, preset in self.presets.items() if all(self.values[k] == v for k, v in preset.items())
            )
            self._preset.value = next(matching, CUSTOM)

    def _frame(self, values: dict) -> tuple[Mapping, bytes, str]:
        """(result, picture, table) of one setting of the controls, from the cache where it is there."""
        key = tuple(values.items())
        if key not in self._frames:
            result = self._compute(**values)
            self._frames[key] = result, self._render(result), table(result)
        self._frames.move_to_end(key)
        frame = self._frames[key]
        while len(self._frames) > self._keep:
            self._frames.popitem(last=False)
        return frame

    def _render(self, result: Mapping) -> bytes:
        if self._draw is None:
            return b""
        self.renders += 1
        with styled():
            fig = new_figure(self._size)
            self._draw(fig, result)
            return png(fig)

    @contextlib.contextmanager
    def _holding(self):
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    # what code uses
    @property
    def values(self) -> dict:
        """The controls' values by name."""
        return {name: control.value for name, control in self.controls.items()}

    def set(self, **values) -> Explorer:
        """Move controls and redraw once. Raises ValueError, changing nothing, for what does not fit."""
        before = self.values
        try:
            with self._holding():
                self._move(self._expanded(values))
            self._refresh()
        except (ValueError, TraitError):
            with self._holding():
                self._move(before)
            raise
        return self

    def warm(self, **grid) -> Explorer:
        """Draw frames ahead: `warm(bits=range(2, 9))`, the other controls staying where they are."""
        for name, settings in grid.items():
            self._known(name)
            for setting in settings:
                self._frame({**self.values, name: setting})
        return self

    def _expanded(self, values: dict) -> dict:
        preset = values.pop("preset", None)
        if preset is None:
            return values
        if preset not in self.presets:
            raise ValueError(f"{self._name}: no preset {preset!r}; choose one of {', '.join(self.presets)}")
        return {**self.presets[preset], **values}

    def _known(self, name: str) -> None:
        if name not in self.controls:
            raise ValueError(f"{self._name}: no control {name!r}; it has {', '.join(self.controls)}")

    def _move(self, values: dict) -> None:
        for name in values:
            self._known(name)
        # in the controls' own order: one may set what the next can choose
        for name, control in self.controls.items():
            if name in values:
                wanted = values[name]
                try:
                    control.value = wanted
                    self._settle(self.controls)
                except TraitError:
                    raise ValueError(
                        f"{self._name}: {name}={wanted!r} does not fit; {choices(control)}"
                    ) from None
                if control.value != wanted:  # ipywidgets clamps without a word
                    raise ValueError(f"{self._name}: {name}={wanted!r} does not fit; {choices(control)}")

    # what a saved notebook keeps
    def _said(self) -> str:
        preset = self._preset.value
        covered = self.presets.get(preset, {})
        given = [f"preset={preset!r}"] if covered else []
        given += [f"{name}={value!r}" for name, value in self.values.items() if name not in covered]
        numbers = [
            value if name == "says" else f"{label(name)} {say(name, value)}"
            for name, value in shown(self.result).items()
        ]
        return f"{self._name}({', '.join(given)}) -> {'; '.join(numbers)}"

    def __repr__(self) -> str:
        return self._said()

    def _repr_mimebundle_(self, **kwargs) -> dict:
        data = {**(super()._repr_mimebundle_(**kwargs) or {}), "text/plain": repr(self)}
        if self._png:
            data["image/png"] = base64.b64encode(small_png(self._png)).decode()
        else:
            data["text/html"] = self._numbers.value
        return data
