"""What every explorer must pass."""

import os
import time

import ipywidgets as W

from lightlib.widgets.explorer import Explorer


def is_the_same_twice(make) -> None:
    """Two of a kind are equal byte by byte and read on one line; descriptions fit where they stand."""
    one, other = make(), make()
    assert repr(one) == repr(other) and one._png == other._png
    assert "0x" not in repr(one) and "\n" not in repr(one)
    for control in one.controls.values():
        assert 7 * len(control.description) < float(control.style.description_width.removesuffix("px"))


def redraws_within_200_ms(make) -> None:
    """Nothing cached; the faster of two passes counts. If others take the cores, only our own time counts."""
    ex, crowded = make(cache=0), os.getloadavg()[0] > os.cpu_count()
    passes = redraws(ex), redraws(ex)
    times = sorted(map(min, *([move[1 if crowded else 0] for move in one] for one in passes)))
    assert times[int(0.95 * len(times))] < 200


def settings(control) -> list:
    """Up to 7 values of a control, from one end to the other."""
    if isinstance(control, W.Checkbox):
        return [not control.value, control.value]
    if hasattr(control, "options"):
        listed = [o[1] if isinstance(o, tuple) else o for o in control.options]
        return listed[:: max(1, len(listed) // 6)]
    steps = round((control.max - control.min) / control.step)
    places = [round(i * steps / min(steps, 6)) for i in range(min(steps, 6) + 1)]
    return [control.min + place * control.step for place in places]


def redraws(ex: Explorer) -> list[tuple[float, float]]:
    """(elapsed, own CPU) ms from a control's move until the new picture is ready, for all controls."""
    times = []
    for name, control in ex.controls.items():
        home = control.value
        for value in settings(control):
            if value == control.value:
                continue
            drawn, begin, busy = ex.renders, time.perf_counter(), time.thread_time()
            control.value = value
            times.append(((time.perf_counter() - begin) * 1e3, (time.thread_time() - busy) * 1e3))
            assert ex.renders == drawn + 1 and "alert" not in ex._numbers.value, f"{name}={value}"
        control.value = home
    return times
