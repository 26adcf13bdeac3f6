"""FlashAttention-4's kernel (package ``flash-attn-4``, CuTe DSL: Hopper, Blackwell) executes a BlockPlan.

A plan goes to it in the form of fa4_tables.py. Where all blocks are 128 rows it runs on the tensors as they are.
Otherwise they are gathered into a copy with every block padded with zeros, and the output is gathered back. The mask reads its
encodings from tables, so a new grid compiles nothing.

On Blackwell FA4 computes 256 query rows with one list: plans in which blocks 2 i and 2 i + 1 list the same keys (tiles of an even
number of blocks) run there, others do not. Its kernels have been compiled for it, but not run on one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
from functools import cache, lru_cache
from typing import Any

import torch

from tilewise.kernels.attention.backends.fa4_tables import GUARD, PADDING, ROWS, seen, tables_of
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.block_plan import BlockPlan

PACKAGE = "flash-attn-4"


# ── whether it can run ───────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=16)
def fa4_unavailable(device: torch.device) -> str | None:
    """Why FA4 cannot run on a device, or None if it can. The first call that finds it installed imports it (seconds)."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return f"FlashAttention-4 needs an NVIDIA GPU, not {device.type if device.type != 'cuda' else 'this one'}"
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {PACKAGE} is not installed: pip install 'tilewise[fa4]'"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0) and major != 10:
        name = torch.cuda.get_device_name(device)
        return f"its block-sparse kernel is for compute capability 9.0 and 10.x, {name} has {major}.{minor}"
    try:
        _library()
    except Exception as error:  # installed for another Python, CUDA or version of its own dependencies
        return f"{PACKAGE} is installed but cannot be imported: {type(error).__name__}: {error}"
    return None


def fa4_unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan) -> str | None:
    """Why FA4 does not take these tensors or this plan, or None if it does. Shapes were validated before.

    The first call for a plan makes its tables (some milliseconds, and it waits for the device); later ones look them up."""
    D = q.shape[3]
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} is not a 16-bit type"
    if not 16 <= D <= 128 or D % 8:
        return f"head dimension {D} is not a multiple of 8 from 16 to 128"
    if plan.device_density is not None:
        return "the plan is of this call alone: FA4's tables would wait for the device at every call"
    tables = tables_of(plan, _blackwell(q.device))
    return tables if isinstance(tables, str) else None


def _blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


# ── running it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def fa4_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale · q kᵀ) v over a plan's key blocks. Shapes as in ``block_sparse_attention``, which validates them.

    Returns:
        out (B, Sq, H, D) and lse (B, H, Sq) float32, natural; a row that sees no key has 0 and −inf.

    Raises:
        UnsupportedPlanError: for a plan that ``fa4_unsupported`` refuses.
    """
    tables = tables_of(plan, _blackwell(q.device))
    if isinstance(tables, str):
        raise UnsupportedPlanError(
            f"fa4_forward(q {tuple(q.shape)}, k {tuple(k.shape)}): cannot execute this plan: {tables}"
        )
    return fa4_op(q, k, v, *tables, scale)


@torch.library.custom_op("tilewise::fa4_attention", mutates_args=(), device_types="cuda")
def fa4_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    mask_count: torch.Tensor,
    mask_index: torch.Tensor,
    q_source: torch.Tensor | None,
    q_padding: torch.Tensor | None,
    q_place: torch.Tensor | None,
    k_source: torch.Tensor | None,
    k_padding: torch.Tensor | None,
    key_encoding: torch.Tensor | None,
    row_encoding: torch.Tensor | None,
    head_set: torch.Tensor | None,
    has_text: bool,
    q_rows: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FA4 as a PyTorch operator (``Fa4Tables`` one by one), so that torch.compile keeps it whole."""
    forward, lists, _ = _library()
    q, k, v = _pad(q, q_source, q_padding), _pad(k, k_source, k_padding), _pad(v, k_source, k_padding)
    options: dict[str, Any] = {}
    if key_encoding is not None:
        tensors = [x for x in (key_encoding, row_encoding, head_set) if x is not None]
        options = {"mask_mod": mask_function(len(tensors), has_text), "aux_tensors": tensors}
    with torch.cuda.device(q.device):
        out, lse, *_ = forward(
            q, k, v, softmax_scale=scale, return_lse=True, pack_gqa=False, **options,
            block_sparse_tensors=lists(mask_count, mask_index, full_count, full_index, block_size=(q_rows, ROWS)),
        )  # fmt: skip
    return (out, lse) if q_place is None else (out.index_select(1, q_place), lse.index_select(2, q_place))


@fa4_op.register_fake
def _(q, *args):
    B, Sq, H, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((B, H, Sq), dtype=torch.float32)


def _pad(x: torch.Tensor, source: torch.Tensor | None, padding: torch.Tensor | None) -> torch.Tensor:
    """(B, padded rows, H, D) with zeros for padding, or ``x`` itself where nothing is padded. Padding is masked, but a weight
    of 0 times what is not finite is not 0."""
    return x if source is None or padding is None else x.index_select(1, source).index_fill_(1, padding, 0)


@cache
def _library() -> tuple[Any, Any, Any]:
    """(FA4's forward, its type for lists, its utilities)."""
    from flash_attn.cute import utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd, BlockSparseTensorsTorch, utils


@cache
def mask_function(tables: int, has_text: bool) -> Any:
    """FA4's ``mask_mod``. tables: 1 key encoding; 2 and row encoding of all heads; 3 and which row encoding each head uses."""
    import cutlass
    import cutlass.cute as cute

    utils = _library()[2]

    @cute.jit
    def padding(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return utils.scalar_to_ssa(aux_tensors[0][kv_idx[0]], cutlass.Int32) != PADDING

    @cute.jit
    def intervals(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        key = utils.scalar_to_ssa(aux_tensors[0][kv_idx[0]], cutlass.Int32)
        first = utils.scalar_to_ssa(aux_tensors[1][0, 0, q_idx[0]], cutlass.Int32)
        last = utils.scalar_to_ssa(aux_tensors[1][0, 1, q_idx[0]], cutlass.Int32)
        return seen(key, first, last)

    @cute.jit
    def intervals_text(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        key = utils.scalar_to_ssa(aux_tensors[0][kv_idx[0]], cutlass.Int32)
        first = utils.scalar_to_ssa(aux_tensors[1][0, 0, q_idx[0]], cutlass.Int32)
        last = utils.scalar_to_ssa(aux_tensors[1][0, 1, q_idx[0]], cutlass.Int32)
        return seen(key, first, last) | (key < 0)

    @cute.jit
    def head_intervals(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        of_head = aux_tensors[2][head[0]]
        key = utils.scalar_to_ssa(aux_tensors[0][kv_idx[0]], cutlass.Int32)
        first = utils.scalar_to_ssa(aux_tensors[1][of_head, 0, q_idx[0]], cutlass.Int32)
        last = utils.scalar_to_ssa(aux_tensors[1][of_head, 1, q_idx[0]], cutlass.Int32)
        return seen(key, first, last)

    @cute.jit
    def head_intervals_text(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        of_head = aux_tensors[2][head[0]]
        key = utils.scalar_to_ssa(aux_tensors[0][kv_idx[0]], cutlass.Int32)
        first = utils.scalar_to_ssa(aux_tensors[1][of_head, 0, q_idx[0]], cutlass.Int32)
        last = utils.scalar_to_ssa(aux_tensors[1][of_head, 1, q_idx[0]], cutlass.Int32)
        return seen(key, first, last) | (key < 0)

    chosen = {
        (1, False): padding, (1, True): padding,
        (2, False): intervals, (2, True): intervals_text,
        (3, False): head_intervals, (3, True): head_intervals_text,
    }[tables, has_text]  # fmt: skip
    # FA4 knows a compiled kernel again by this; by itself it would not look at ``seen``.
    source = inspect.getsource(seen) + f"{tables} {has_text} {PADDING} {GUARD}"
    chosen.__cute_hash__ = hashlib.sha256(source.encode()).hexdigest()
    return chosen
