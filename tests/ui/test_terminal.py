"""Text from outside on a terminal: brackets, emoji codes, escape codes, and marks that turn the direction."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

import tilewise
from tilewise.ui.cli.app import app
from tilewise.ui.cli.batch_progress import watching
from tilewise.ui.common.terminal import Terminal, say, shown

WORLD = type("World", (), {"rank": 0, "size": 1})()
# what is given → what is seen
OUTSIDE = {
    "a [red]circle[/red]": "a [red]circle[/red]",
    "a circle [/bold] [link=x]": "a circle [/bold] [link=x]",
    "a :smile: circle": "a :smile: circle",
    "a \x1b[31mred\x1b[0m circle\x07": r"a \x1b[31mred\x1b[0m circle\x07",
    "a circle\rgone": r"a circle\rgone",
    "a \u202eelcric\u202c \x9b31m": r"a \u202eelcric\u202c \x9b31m",
    "a circle\udc80 \u2028": r"a circle\udc80 \u2028",
    "دائرة حمراء": "دائرة حمراء",
    "赤い円 👩\u200d🚀": "赤い円 👩\u200d🚀",
}


@pytest.mark.parametrize("text", OUTSIDE)
def test_what_is_printed_is_what_was_given(text, capsys):
    terminal = Terminal(file=io.StringIO(), width=200, highlight=False)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    terminal.print(table)
    terminal.print(text, style="yellow")
    terminal.note(text)
    with terminal.status(f"loading {text}"):
        pass
    assert terminal.file.getvalue().count(OUTSIDE[text]) == 5
    say(text)
    assert capsys.readouterr().out == OUTSIDE[text] + "\n"


def test_right_to_left_text_does_not_turn_what_stands_around_it():
    terminal = Terminal(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    terminal.print("دائرة\nred")
    assert terminal.file.getvalue() == "\u2068دائرة\u2069\n\u2068red\u2069\n"


def test_progress_of_a_batch_shows_names_as_they_are():
    terminal = Terminal(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    with watching(terminal, WORLD) as bars:
        bars.begin(2, 0, 2)
        bars.loading("[/x] \x1b[31m")
        bars.note("a [bold]note")
    assert r"loading [/x] \x1b[31m" in terminal.file.getvalue()
    assert "a [bold]note" in terminal.file.getvalue()


@pytest.mark.parametrize("text", list(OUTSIDE)[1:6:2])
def test_a_dry_run_shows_prompts_as_they_are(text, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(tiny_pipe_dir), "--steps", "1", "--dry-run"]
    result = CliRunner().invoke(app, ["generate", text, *words])
    assert result.exit_code == 0, result.output
    assert OUTSIDE[text] in result.stdout
    Path("p.jsonl").write_text(json.dumps({"prompt": "x", "id": "n", "method": text}))
    refused = CliRunner().invoke(app, ["batch", "p.jsonl", *words])
    assert refused.exit_code == 2
    assert "\x1b" not in refused.output and "\u202e" not in refused.output
    assert text.split()[0] in refused.output


def test_reasons_of_a_summary_keep_their_brackets():
    config = tilewise.resolve("sta")
    row = tilewise.plugins.summary.SummaryRow(
        "transformer", "0", "fallback", 1, 1, 1, 1.0, "torch", 0.0, "[bold] of [1, 2]"
    )
    told = str(tilewise.plugins.summary.Summary(config.to_dict(), [row], {}, {}))
    assert "[bold] of [1, 2]" in " ".join(told.split())


def test_what_is_safe_is_left_alone():
    text = "naïve – “quotes”\n\ttab × ≥"
    assert shown(text) == text
