"""Block-sparse attention: one entry point, one validation function that also chooses the backend and says why."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, overload

import torch

from tilewise.kernels.attention import tuned
from tilewise.kernels.attention.backends.fa4 import fa4_forward, fa4_unavailable, fa4_unsupported
from tilewise.kernels.attention.backends.torch import torch_forward
from tilewise.kernels.attention.block_compensation import BlockCompensation
from tilewise.kernels.chips import chip_of
from tilewise.kernels.device import triton_unavailable as _triton_unavailable
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.block_plan import BlockPlan

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256  # any from 1 on: a kernel's products are wider where they must be, over zeros that are in no memory


@dataclass(frozen=True)
class Choice:
    """A backend, and the reason it was chosen. ``means``: it takes means in the same launch."""

    backend: str
    reason: str
    means: bool = False


def _gluon_unavailable(device: torch.device) -> str | None:
    """Why the Hopper kernel cannot run on a device, or None if it can."""
    if reason := _triton_unavailable(device):
        return reason
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return f"needs a Hopper GPU (compute capability 9.0), not {torch.cuda.get_device_name(device)}"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= (3, 6) else f"needs Triton 3.6 or later, found {triton.__version__}"


@dataclass(frozen=True)
class Backend:
    """One way to execute a plan: whether it runs on a device, and whether it takes a call (None: it does)."""

    name: str
    about: str
    unavailable: Callable[[torch.device], str | None]
    unsupported: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, BlockPlan], str | None] = lambda q, k, v, plan: (
        None
    )


def _gluon_unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan) -> str | None:
    from tilewise.kernels.attention.backends.hopper import (
        hopper_unsupported,  # imports Triton's Gluon: only where it is there
    )

    return hopper_unsupported(q, k, v, plan)


def _triton_unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan) -> str | None:
    from tilewise.kernels.attention.backends.tiles import no_tile

    return no_tile("triton", chip_of(q.device), q.shape[3])


# In order of preference, unless ``tilewise tune`` has measured another on this machine.
# On aligned plans FlashAttention-4 is up to 8 % faster than ours, on ragged and partial ones slower
# (benchmarks/results), and its first call costs seconds: ours comes first where it runs.
BACKENDS = (
    Backend("gluon", "Hopper kernel in Triton's Gluon dialect", _gluon_unavailable, _gluon_unsupported),
    Backend("fa4", "FlashAttention-4's block-sparse kernel, Hopper and Blackwell", fa4_unavailable, fa4_unsupported),
    Backend(
        "triton", "portable Triton kernel, compute capability 8.0 and later", _triton_unavailable, _triton_unsupported
    ),
    Backend(
        "torch",
        "gathered blocks through PyTorch's CPU flash attention",
        lambda device: None if device.type == "cpu" else "CPU only",
    ),
)


def available_backends(device: torch.device | str) -> list[tuple[str, bool, str]]:
    """(name, whether it can run on ``device``, why or why not) for each backend, the preferred one first."""
    device = torch.device(device)
    return [(b.name, reason is None, reason or b.about) for b in BACKENDS for reason in [b.unavailable(device)]]


def unsupported(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why no kernel takes a head dimension or dtype, or None if they do."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head dimension must be 1 to {MAX_HEAD_DIM}, got {head_dim}"
    if dtype not in DTYPES:
        return f"dtype must be float16, bfloat16 or float32, got {dtype}"
    return None


def choose_backend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, backend: str | None = None
) -> Choice:
    """Check that ``plan`` can be executed on these tensors, and by what.

    Raises:
        UnsupportedPlanError: no backend takes these tensors (dtype, head dimension, strides) or runs on their device, or the
            one that was asked for does not. Dense attention can compute such a call.
        ValueError: the tensors do not fit each other, or the plan is for others: another length, batch, head count or device;
            or an unknown backend.
    """
    if error := _wrong(q, k, v, plan):
        raise type(error)(f"{_where(q, k, v)}: {error}")
    return _choice(q, k, v, plan, backend)


def _where(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    return f"block_sparse_attention(q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)})"


def _wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan) -> ValueError | None:
    """The error where no backend takes a call. Runs at every one: makes no text unless there is something wrong."""
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        return ValueError("q must be (B, Sq, H, D), k and v (B, Sk, Hk, D) of one shape")
    B, Sq, H, D = q.shape
    if k.shape[0] != B or k.shape[3] != D:
        return ValueError("batch size and head dimension of q, k and v must be equal")
    if k.shape[2] == 0 or H % k.shape[2]:
        return ValueError(f"the {H} query heads must be a multiple of the {k.shape[2]} key heads")
    if not 1 <= D <= MAX_HEAD_DIM:
        return UnsupportedPlanError(f"head dimension must be 1 to {MAX_HEAD_DIM}, got {D}; use dense attention")
    if (q.dtype, q.dtype) != (k.dtype, v.dtype) or q.dtype not in DTYPES:
        return UnsupportedPlanError(
            f"needs one dtype of float16, bfloat16, float32, got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one"
        )
    if not q.device == k.device == v.device == plan.device:
        return ValueError(
            f"q, k, v and the plan must be on one device, got {q.device}, {k.device}, {v.device} and "
            f"{plan.device}; move the plan with plan.to(q.device)"
        )
    if (plan.q_len, plan.k_len) != (Sq, k.shape[1]):
        return ValueError(f"the plan is for {plan.q_len} queries and {plan.k_len} keys; build one for this grid")
    if plan.index.shape[0] not in (1, B):
        return ValueError(f"the plan has lists for {plan.index.shape[0]} samples, the batch is {B}")
    if plan.head_set is None and plan.sets not in (1, H):
        return ValueError(f"the plan has lists for {plan.sets} heads, q has {H}")
    if plan.head_set is not None and len(plan.head_set) != H:
        return ValueError(f"the plan's head_set is for {len(plan.head_set)} heads, q has {H}")
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return UnsupportedPlanError(
            "the head dimension must be contiguous; call .contiguous() on the tensor that is not"
        )
    return None


@cache
def _unavailable(candidate: Backend, device: torch.device) -> str | None:
    """``candidate.unavailable``, asked once: what a machine has does not change, and asking takes longer than a launch."""
    return candidate.unavailable(device)


def _choice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, backend: str | None) -> Choice:
    known = {candidate.name: candidate for candidate in BACKENDS}
    if backend is not None:
        if backend not in known:
            raise ValueError(f"{_where(q, k, v)}: unknown backend {backend!r}; there are {', '.join(known)}")
        if reason := _unavailable(known[backend], q.device) or known[backend].unsupported(q, k, v, plan):
            raise UnsupportedPlanError(f"{_where(q, k, v)}: backend {backend!r} cannot run this: {reason}")
        return Choice(backend, "asked for", backend == "gluon")
    unsupported: list[str] = []  # what runs here and would have been preferred, but does not take this call
    unavailable: list[str] = []
    order = tuned.backends(q.device, q.shape[3], plan.row_encoding is not None)
    candidates = dict.fromkeys((*(known[name] for name in order if name in known), *BACKENDS)) if order else BACKENDS
    for candidate in candidates:
        if reason := _unavailable(candidate, q.device):
            unavailable.append(f"{candidate.name}: {reason}")
        elif reason := candidate.unsupported(q, k, v, plan):
            unsupported.append(f"{candidate.name} does not take this: {reason}")
        else:
            measured = ["the fastest that tilewise tune measured here"] if candidate.name in order else []
            return Choice(
                candidate.name, "; ".join([candidate.about, *measured, *unsupported]), candidate.name == "gluon"
            )
    raise UnsupportedPlanError(
        f"{_where(q, k, v)}: no backend takes this here. " + "; ".join([*unavailable, *unsupported])
    )


@overload
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: str | Choice | None = None,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: str | Choice | None = None,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: str | Choice | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale · q kᵀ) v over the key blocks that ``plan`` lists for each query block.

    Args:
        q: (B, Sq, H, D) float16, bfloat16 or float32, any strides with a contiguous D, 1 ≤ D ≤ 256.
        k, v: (B, Sk, Hk, D), Hk dividing H (grouped-query attention).
        plan: on the same device; see ``BlockPlan``.
        scale: default 1/√D.
        backend: "gluon", "fa4", "triton" or "torch"; None: the best that runs here and takes this call. Or what
            ``choose_backend`` said of these very tensors and plan: then they are not checked a second time.
        return_lse: also return the natural log-sum-exp of the scaled scores, (B, H, Sq) float32, which lets partial
            results over disjoint keys be merged exactly.

    Returns:
        (B, Sq, H, D) in q's dtype. A query that sees no key has output 0 and log-sum-exp −inf.

    Raises:
        UnsupportedPlanError, ValueError: see ``choose_backend``.
    """
    choice = backend if isinstance(backend, Choice) else choose_backend(q, k, v, plan, backend)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if choice.backend == "torch":
        out, lse = torch_forward(q, k, v, plan, scale)
    elif choice.backend == "fa4":
        out, lse = fa4_forward(q, k, v, plan, scale)
    elif _plain(q, k, v):
        out, lse = _run_own(q, k, v, plan, scale, choice.backend)
    else:
        out, lse = block_sparse_op(
            q, k, v, plan.q_start, plan.q_rows, plan.k_start, plan.k_rows, plan.index, plan.key_start, plan.ends,
            plan.head_set, plan.key_encoding, plan.row_encoding, plan.guard_bits, plan.block, scale, choice.backend,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def takes_means(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, choice: Choice) -> bool:
    """Whether what was chosen for a call takes means in the same launch: ``block_sparse_attention_with_means``, or in 8 bits
    ``block_sparse_attention_8bit_with_means``."""
    return choice.means and q.is_cuda and _plain(q, k, v)


def block_sparse_attention_with_means(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    means: BlockCompensation,
    scale: float | None = None,
) -> torch.Tensor:
    """``block_sparse_attention`` and ``add_block_compensation`` in one launch, for calls that ``takes_means`` says it takes.

    Args:
        q, k, v, plan, scale: as in ``block_sparse_attention``; what ``choose_backend`` has checked.
        means: over as many query blocks as the plan has; rounded to q's dtype, as keys and values are.

    Returns:
        (B, Sq, H, D) in q's dtype.

    Raises:
        ValueError: means that do not fit the call, with all shapes.
    """
    check_means(q, k, plan, means)
    from tilewise.kernels.attention.backends.hopper import hopper_forward

    return hopper_forward(q, k, v, plan, 1 / math.sqrt(q.shape[3]) if scale is None else scale, means)[0]


def check_means(q: torch.Tensor, k: torch.Tensor, plan: BlockPlan, means: BlockCompensation) -> None:
    """Raises ValueError where means do not fit a call, with all shapes."""
    (B, _, H, D), N = q.shape, means.key_mean.shape[1]
    blocks = plan.index.shape[2]
    fits = means.key_mean.shape == means.value_mean.shape == (B, N, k.shape[2], D)
    if not fits or means.bias.shape != (B, H, blocks, N):
        raise ValueError(
            f"attention with means: key_mean {tuple(means.key_mean.shape)}, value_mean "
            f"{tuple(means.value_mean.shape)} and bias {tuple(means.bias.shape)} do not fit q {tuple(q.shape)}, the {k.shape[2]} "
            f"key heads and the {blocks} query blocks of the plan"
        )


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a kernel can be launched straight away, which saves the host an operator's way through PyTorch's dispatcher: no
    graph is being made, no gradient recorded, and the tensors are plain ones."""
    if torch.compiler.is_compiling() or not type(q) is type(k) is type(v) is torch.Tensor:
        return False
    return not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))


@torch.library.custom_op("tilewise::block_sparse_attention", mutates_args=(), device_types=("cpu", "cuda"))
def block_sparse_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_start: torch.Tensor,
    q_rows: torch.Tensor,
    k_start: torch.Tensor,
    k_rows: torch.Tensor,
    index: torch.Tensor,
    key_start: torch.Tensor,
    ends: torch.Tensor,
    head_set: torch.Tensor | None,
    key_encoding: torch.Tensor | None,
    row_encoding: torch.Tensor | None,
    guard_bits: int,
    block: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our kernels as a PyTorch operator (a BlockPlan's tensors one by one), so that torch.compile keeps them whole."""
    plan = BlockPlan(
        q_start=q_start, q_rows=q_rows, k_start=k_start, k_rows=k_rows, index=index, key_start=key_start, ends=ends,
        block=block, q_len=q.shape[1], k_len=k.shape[1], density=math.nan, work=math.nan,
        head_set=head_set, key_encoding=key_encoding, row_encoding=row_encoding, guard_bits=guard_bits,
    )  # fmt: skip
    return _run_own(q, k, v, plan, scale, backend)


def _run_own(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp by one of our kernels, or what stands for it on a CPU."""
    if q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return torch_forward(q, k, v, plan, scale)
    # Imported here: where Triton is missing, nothing gets here.
    if backend == "gluon":
        from tilewise.kernels.attention.backends.hopper import hopper_forward

        return hopper_forward(q, k, v, plan, scale)
    from tilewise.kernels.attention.backends.triton import triton_forward

    return triton_forward(q, k, v, plan, scale)


@block_sparse_op.register_fake
def _(q, k, v, *tables_and_options):
    B, Sq, H, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((B, H, Sq), dtype=torch.float32)
