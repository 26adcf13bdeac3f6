"""Parameters of a command from declared options (`tilewise.pipelines.options`). Nothing here imports PyTorch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

import typer

from tilewise.pipelines.generation.method_options import SET, flag, parse_set
from tilewise.pipelines.generation.settings import parse_seed
from tilewise.pipelines.highres.settings import HIGHRES, TWO_STAGE_OPTIONS
from tilewise.pipelines.memory.options import MEMORY_OPTIONS
from tilewise.pipelines.options import Option
from tilewise.pipelines.streaming.settings import STREAM, STREAM_OPTIONS
from tilewise.plugins.errors import ConfigError

TYPES = {"whole": int, "number": float, "flag": bool, "texts": list[str]}  # all others are text
KEYWORD = inspect.Parameter.KEYWORD_ONLY
MODES = (HIGHRES, STREAM)
PANELS = {**dict.fromkeys([HIGHRES.name, *TWO_STAGE_OPTIONS], "Options of --highres")}
PANELS |= dict.fromkeys(MEMORY_OPTIONS, "Memory")
PANELS |= dict.fromkeys([STREAM.name, *STREAM_OPTIONS], "Options of --stream")

SEED = "seed"  # a number, or "random"

F = TypeVar("F", bound=Callable[..., None])


def declared_options(options: Iterable[Option]) -> Callable[[F], F]:
    """Decorates a command with a parameter `options`: the command line gets one parameter for each option in its place, and the
    command a dict of the values that were given, by name; of --set, "set.NAME" and so on (`parse_set`)."""
    declared = list(options)

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            values = {option.name: given.pop(option.name) for option in declared}
            said = {name: value for name, value in values.items() if value not in (None, [])}
            if SEED in said:
                said[SEED] = parse_seed(said[SEED])
            of_method = parse_set(said.pop(SET.name, []))
            if twice := [name for name in of_method if name in said]:
                raise ConfigError(f"--set {twice[0]} and {flag(twice[0])} are the same: give one of them")
            command(**given, options=said | of_method)

        parameters: list[inspect.Parameter] = []
        for own in inspect.signature(command, eval_str=True).parameters.values():
            parameters += (
                [_parameter(option) for option in declared] if own.name == "options" else [own.replace(kind=KEYWORD)]
            )
        # Typer reads the signature and the annotations.
        signature: Any = with_options
        signature.__signature__ = inspect.Signature(parameters)
        signature.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options  # type: ignore[return-value]

    return decorate


def _parameter(option: Option) -> inspect.Parameter:
    """None stands for what is not given: a clip made again, or a line of a batch, has its own."""
    kind: Any = (str if option.name == SEED else TYPES.get(option.kind, str)) | None
    names = [f"--{option.name}"] if option in MODES else []  # without --no-highres
    help_text = option.help
    if option.choices and not all(choice in help_text for choice in option.choices):
        help_text = f"{help_text} One of {', '.join(option.choices)}."
    info = typer.Option(
        *names,
        help=help_text,
        show_default=option.default_text or False,
        rich_help_panel=PANELS.get(option.name),
    )
    return inspect.Parameter(option.name, KEYWORD, default=None, annotation=Annotated[kind, info])
