"""HTML with buttons in it that call the server: gr.HTML whose `click` event tells which one."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

# Focus survives when the list is drawn anew, so that it can be walked through with the keyboard while a job goes on.
SCRIPT = """
let last = null;
const keyOf = (node) => node && node.dataset && node.dataset.action ? node.dataset.action + ' ' + node.dataset.name : null;
element.addEventListener('focusin', (event) => { last = keyOf(event.target); });
element.addEventListener('focusout', (event) => { if (event.relatedTarget) last = null; });
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-action]');
  if (!button) return;
  for (const other of element.querySelectorAll('[aria-pressed]')) other.setAttribute('aria-pressed', other === button);
  trigger('click', {action: button.dataset.action, name: button.dataset.name});
});
watch('value', () => {
  if (!last || document.activeElement !== document.body) return;
  for (const node of element.querySelectorAll('[data-action]')) if (keyOf(node) === last) node.focus();
});
"""


def action_html(value: str = "", **options: Any) -> Any:
    """A gr.HTML for `action_button`s. Handlers of its `click` read `chosen(event)`."""
    return gr.HTML(value, js_on_load=SCRIPT, **options)


def action_button(action: str, name: str, words: str, label: str = "") -> str:
    """label: for screen readers, where the words alone do not say enough."""
    told = f' aria-label="{escape(label, quote=True)}"' if label else ""
    return (
        f'<button type="button" class="tw-button" data-action="{escape(action, quote=True)}" '
        f'data-name="{escape(name, quote=True)}"{told}>{escape(words)}</button>'
    )


def chosen(event: gr.EventData) -> tuple[str, str]:
    """(action, name) of the button; empty where there was none."""
    told = event._data if isinstance(event._data, dict) else {}
    return str(told.get("action", "")), str(told.get("name", ""))
