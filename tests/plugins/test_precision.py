"""``precision``: 8-bit products where they run, 16 bits with the reason where not; the kernels have tests of their own."""

import pytest

import tilewise
from tilewise.plugins.runtime import sparse_call


def test_where_it_cannot_run_16_bits_do_and_it_is_said(tiny_pipe):
    tilewise.patch(tiny_pipe, tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2)), steps=(0, 1), precision="int8")
    tiny_pipe("a", height=64, width=64, num_frames=9, num_inference_steps=2)
    rows = tilewise.summary(tiny_pipe).rows
    assert {(row.kind, row.reason) for row in rows} == {
        ("sparse", "not in int8: Triton kernels need a CUDA device, not cpu")
    }


def test_strict_refuses(tiny_pipe):
    method = tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2))
    tilewise.patch(tiny_pipe, method, steps=(0, 1), precision="fp8", strict=True)
    with pytest.raises(tilewise.FallbackError, match="not in fp8: Triton kernels need a CUDA device, not cpu"):
        tiny_pipe("a", height=64, width=64, num_frames=9, num_inference_steps=2)


def test_where_it_runs_it_is_what_runs(tiny_pipe, monkeypatch):
    """The choice, on a CPU that passes for a GPU; the call itself is answered here."""
    asked = []

    def in_8_bits(q, k, v, plan, *, precision, scale=None, return_lse=False):
        asked.append(precision)
        return sparse_call.block_sparse_attention(q, k, v, plan, scale=scale, return_lse=return_lse)

    monkeypatch.setattr(sparse_call, "choose", lambda qkv, plan, precision: (sparse_call.Choice(precision, ""), ""))
    monkeypatch.setattr(sparse_call, "block_sparse_attention_8bit", in_8_bits)
    monkeypatch.setattr("tilewise.plugins.runtime.call_planner.choose", sparse_call.choose)
    config = tilewise.Config(tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2)), steps=(0, 1), precision="int8")
    tilewise.patch(tiny_pipe, tilewise.Config.from_dict(config.to_dict()))
    tiny_pipe("a", height=64, width=64, num_frames=9, num_inference_steps=2)
    assert set(asked) == {"int8"}
    assert {row.backend for row in tilewise.summary(tiny_pipe).rows} == {"int8"}


def test_unknown_precision_is_refused():
    with pytest.raises(tilewise.ConfigError, match="unknown precision 'int4'"):
        tilewise.Config(tilewise.STA(), precision="int4")
