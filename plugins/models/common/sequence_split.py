"""Context parallel plans for models that diffusers has none for."""

from __future__ import annotations

from typing import Any

from tilewise.plugins.diffusers_compat import gathered_output, split_input

ONE_BLOCK = "it has one block, which cannot be where its sequence is split and where it is put together"


def joint_plan(first: str, rope: str | None = None, *, rope_axes: int = 2, **by_block: Any) -> dict[str, Any]:
    """Text and picture are split where they enter the block ``first``, and the picture is gathered after ``proj_out``.

    Args:
        rope: the module whose two outputs are rotary tables, (tokens, …) with so many axes; None: there is none.
        by_block: entries of all blocks of the first one's stack, by parameter.
    """
    plan: dict[str, Any] = {
        first: {"hidden_states": split_input(1, 3), "encoder_hidden_states": split_input(1, 3)},
        "proj_out": gathered_output(1, 3),
    }
    if rope is not None:
        plan[rope] = {n: split_input(0, rope_axes, output=True) for n in (0, 1)}
    if by_block:
        plan[first.rpartition(".")[0] + ".*"] = by_block
    return plan


def video_plan(stack: str, blocks: int, tables: dict[str, Any], **by_block: Any) -> dict[str, Any] | str:
    """The video's tokens are split where they enter a stack of blocks, and gathered behind its last one, so that what follows has
    them all.

    Args:
        blocks: how many. tables: entries of other modules. by_block: as above.
    """
    if blocks < 2:
        return ONE_BLOCK
    first: dict[str, Any] = {f"{stack}.0": {"hidden_states": split_input(1, 3)}}
    every = {f"{stack}.*": by_block} if by_block else {}
    return {**first, **tables, **every, f"{stack}.{blocks - 1}": gathered_output(1, 3)}
