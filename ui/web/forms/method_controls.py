"""Controls for how much a method keeps, beside the method itself: a density, a recall, or a window. Only what it has is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import gradio as gr

from tilewise.plugins.config import Config, presets, resolve
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import methods
from tilewise.ui.web.forms.slider import Slider

MEASURES = ("density", "recall", "window")
FIELDS = ("measure", "density", "recall", "window_t", "window_h", "window_w")
"""The controls, in the order in which handlers get them."""
START = {"density": 0.25, "recall": 0.9, "window": (3, 3, 3)}
"""What a control says before its method has said anything."""
AXES = ("t", "h", "w")


def measures_of(name: str) -> list[str]:
    """Those of MEASURES that a method or preset has; at most one of them holds."""
    if name not in (*presets(), *methods()):
        return []
    there = {field.name for field in dataclasses.fields(resolve(name).method)}
    return [measure for measure in MEASURES if measure in there]


def measure_values(config: Config) -> dict[str, Any]:
    """What each of FIELDS should say for a config, and the start values for what it does not say."""
    there = measures_of(config.method.name)
    set_ = {name: getattr(config.method, name) for name in there if getattr(config.method, name) is not None}
    measure = next(iter(set_), MEASURES[0])
    said = {**START, **{name: value for name, value in set_.items() if name == measure and not is_per_head(value)}}
    window = dict(zip((f"window_{axis}" for axis in AXES), said["window"], strict=True))
    return {"measure": measure, "density": said["density"], "recall": said["recall"], **window}


def measured(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The option of a method that the controls set. Raises ConfigError."""
    there = measures_of(name)
    if not there:
        return {}
    measure = str(values["measure"])
    if measure not in there:
        measure = there[0]
    if measure != "window":
        return {measure: _number(measure, values[measure])}
    window = [_number(f"window {axis}", values[f"window_{axis}"]) for axis in AXES]
    if any(n != int(n) for n in window):
        raise ConfigError(f"a window has whole numbers t, h, w, not {', '.join(f'{n:g}' for n in window)}")
    return {"window": [int(n) for n in window]}


def is_per_head(value: Any) -> bool:
    """Whether a window is one for each head, which no three fields can say."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], list | tuple)


class MethodControls:
    """Built inside a gr.Blocks, after the dropdown of the method, whose value decides what is shown."""

    def __init__(self, first: Config) -> None:
        said = measure_values(first)
        self.measure = gr.Radio(
            self._labels(first.method.name), value=said["measure"], label="How much is kept, by", elem_id="measure",
            visible=len(measures_of(first.method.name)) > 1,
        )  # fmt: skip
        shown = self._shown(first.method.name, said["measure"])
        self.density = Slider(
            0.05, 1, said["density"], step=0.01, label="Density: share of token pairs", elem_id="density",
            visible=shown["density"],
        )  # fmt: skip
        self.recall = Slider(
            0.5, 1, said["recall"], step=0.01, label="Recall: share of the attention mass", elem_id="recall",
            visible=shown["recall"],
        )  # fmt: skip
        with gr.Row(visible=shown["window"], elem_id="window") as self.row:
            self.window = [
                gr.Number(said[f"window_{axis}"], label=label, elem_id=f"window-{axis}", min_width=80)
                for axis, label in zip(AXES, ("Window: frames", "rows", "columns"), strict=True)
            ]

    @property
    def components(self) -> dict[str, Any]:
        return dict(zip(FIELDS, [self.measure, self.density, self.recall, *self.window], strict=True))

    @property
    def shown(self) -> list[Any]:
        """The components that `show` updates: what is there follows the method and the choice, whoever sets them."""
        return [self.measure, self.density, self.recall, self.row]

    def show(self, name: str, measure: str | None) -> list[Any]:
        there = measures_of(str(name))
        shown = self._shown(str(name), str(measure))
        radio = gr.update(choices=self._labels(str(name)), visible=len(there) > 1)
        return [radio, *(gr.update(visible=shown[each]) for each in MEASURES)]

    def _shown(self, name: str, measure: str) -> dict[str, bool]:
        there = measures_of(name)
        chosen = measure if measure in there else next(iter(there), "")
        return {each: each == chosen for each in MEASURES}

    def _labels(self, name: str) -> list[str]:
        """All of them where a method has none: a choice that is hidden must be valid too."""
        return measures_of(name) or list(MEASURES)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be a number, not {str(value)[:40]!r}") from None
    if number - number != 0:  # infinite or no number
        raise ConfigError(f"{name} must be a number, not {value}")
    return number
