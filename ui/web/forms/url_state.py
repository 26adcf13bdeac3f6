"""The address of the page says what its controls say, so that a reload, the Back button or a link brings them back.

page.js writes the address: whatever differs from how the page starts. The server reads it when the page is opened. An address
may come from anywhere, so that what no control could say is left out here; all else is checked where it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import gradio as gr

MOST = 2000  # characters of a value; a longer one is not in the address


class UrlState:
    """fields: components by the names that the address calls them."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = dict(fields)

    def script(self) -> str:
        """JavaScript that tells page.js the names, and what they say at the start."""
        start = {name: component.value for name, component in self.fields.items()}
        told = json.dumps({"names": list(start), "start": start, "most": MOST}).replace("<", "\\u003c")
        return f"<script>window.tilewiseFields = {told};</script>"

    def wire(self, *also: Any) -> None:
        """The address follows every control, and is written at the events `also`. Nothing goes to the server for that."""
        components = list(self.fields.values())
        gr.on(
            [*(component.change for component in components), *also], None, components, None, trigger_mode="multiple",
            js="(...values) => tilewise.rememberAll(values)",
        )  # fmt: skip

    def read(self, query: Mapping[str, str], usual: Mapping[str, Any]) -> list[Any]:
        """A value for each component, or gr.skip(). usual: where an address says nothing."""
        return [
            self._value(component, query[name]) if name in query else usual.get(name, gr.skip())
            for name, component in self.fields.items()
        ]

    @staticmethod
    def _value(component: Any, text: str) -> Any:
        if len(text) > MOST:
            return gr.skip()
        if isinstance(component, gr.Checkbox):
            return text == "true"
        if isinstance(component, gr.Dropdown | gr.Radio):
            return text if text in [value for _, value in component.choices] else gr.skip()
        if isinstance(component, gr.Slider | gr.Number):
            try:
                number = float(text)
            except ValueError:
                return gr.skip()
            if not math.isfinite(number):
                return gr.skip()
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        return text
