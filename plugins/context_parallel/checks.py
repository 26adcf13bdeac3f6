"""What cannot run under context parallelism, said before a forward begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.context_parallel.halves import halves_of
from tilewise.plugins.context_parallel.token_shares import segments_of
from tilewise.plugins.diffusers_compat import is_sharded, parallel_degrees
from tilewise.plugins.errors import TilewiseError, UnsupportedModelError
from tilewise.plugins.methods.base import Method
from tilewise.plugins.models.common.family import AttentionLayer


def why_dense(denoiser: nn.Module) -> str | None:
    """Why a sharded denoiser's calls cannot be sparse, whatever their grid, or None."""
    _, ring, _ = parallel_degrees(denoiser)
    if ring == 1:
        return None
    return (
        f"ring_degree={ring} splits the keys of a call over ranks, and a rank sees a plan's keys one part after the other; give "
        "ulysses_degree alone, which splits heads"
    )


def why_halves_are_dense(denoiser: nn.Module, method: Method) -> str | None:
    """Why calls cannot be sparse where CFG parallelism halves the batch of a denoiser's forwards, or None."""
    halves = halves_of(denoiser)
    return None if halves is None or not halves.in_batch else method.refuses_some_samples()


def check_sharded(
    name: str, denoiser: nn.Module, layers: Sequence[AttentionLayer], grid: Grid | None, one_tensor: bool
) -> None:
    """Raises TilewiseError for more ranks than heads or tokens, and for lengths that are to be split evenly and cannot.

    name: the denoiser's, for messages. grid: of the forward that begins; None: unknown. one_tensor: see ``Family``.
    """
    ulysses, ring, anything = parallel_degrees(denoiser)
    heads = min((layer.heads for layer in layers), default=ulysses)
    if heads < ulysses:
        raise TilewiseError(
            f"{name}: ulysses_degree={ulysses} gives each of {ulysses} ranks some heads, and the model has {heads} in a layer. "
            f"Use at most {heads} ranks"
        )
    ranks = ulysses * ring
    segments = segments_of(grid, one_tensor) if grid is not None else ()
    if few := [length for length in segments if length < ranks]:
        raise TilewiseError(
            f"{name}: {few[0]} tokens of the grid {grid} cannot be split over {ranks} ranks, each of which needs one of the text "
            f"and one of the picture. Use at most {few[0]} ranks, or a longer prompt"
        )
    uneven = [length for length in segments if length % ranks and not anything]
    if uneven:
        raise TilewiseError(
            f"{name}: {uneven[0]} tokens of the grid {grid} cannot be split evenly over {ranks} ranks. Enable context "
            f"parallelism with ulysses_anything=True, or choose a size whose tokens {ranks} divides"
        )


def is_divided(denoiser: nn.Module) -> bool:
    """Whether context parallelism or CFG parallelism is enabled on a denoiser."""
    return is_sharded(denoiser) or halves_of(denoiser) is not None


def refuse_split(what: str, denoisers: Mapping[str, nn.Module], why: str, *, halves: bool = False) -> None:
    """Raises UnsupportedModelError where context parallelism is enabled on one of these denoisers; with ``halves``, CFG
    parallelism too. why: it cannot be."""
    for name, denoiser in denoisers.items():
        if is_sharded(denoiser):
            found = f"context parallelism splits the tokens of {name} over processes"
        elif halves and halves_of(denoiser) is not None:
            found = f"CFG parallelism divides the forwards of {name} between processes"
        else:
            continue
        raise UnsupportedModelError(f"{what}: {found}: {why}. Use a pipeline without it")
