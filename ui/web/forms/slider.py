"""A slider whose value is validated by our handlers, which answer with a message, instead of by Gradio, which fails the request.

Gradio refuses a value outside of a slider's range before any handler sees it. Ranges here follow the other controls, so that a
value may be outside for the moment between two answers; and a number typed by hand deserves an explanation.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta


def _as_it_is(self: Any, payload: float) -> float:
    return payload


# gr.Slider with another `preprocess`; is_template: the browser's part is that of gr.Slider. Not by a class statement: for each
# subclass of a component, Gradio's metaclass writes a .pyi file into the folder of the source, which may be read-only.
Slider: Any = ABCMeta.__new__(
    ComponentMeta, "Slider", (gr.Slider,), {"is_template": True, "preprocess": _as_it_is, "__module__": __name__}
)
