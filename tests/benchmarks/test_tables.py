"""The benchmark harness measures what it says, and the README shows what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import programs
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    attention,
    families,
    flex,
    fused,
    launch,
    memory,
    profiling,
    render,
    results,
    rows,
    step,
    streaming_windows,
    unets,
)
from benchmarks.layers import shortened  # noqa: E402
from benchmarks.timing import measure  # noqa: E402
from tilewise.kernels.chips import CHIPS  # noqa: E402
from tilewise.kernels.plans.layout import Grid  # noqa: E402
from tilewise.plugins.methods.sta import STA  # noqa: E402

CPU = torch.device("cpu")
TINY = {row.name: row for row in rows.TINY_ROWS}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """One run of everything at tiny size through the command: (result, what it printed, its folder)."""
    folder = tmp_path_factory.mktemp("bench")
    small = ("--tiny", "--device", "cpu", "--seconds", "0.01", "--compiler", "eager")
    printed = programs.run_module("benchmarks", *small, "--out", folder)
    (path,) = folder.glob("cpu-*-tiny.json")
    return json.loads(path.read_text(encoding="utf-8")), printed, folder


# ── the README and the result files ──────────────────────────────────────────────────────────────────────────────────


def test_readme_tables_are_the_result_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render.MARKED.search(text)
    assert render.rendered(text) == text, "run: python -m benchmarks.render"


def test_result_files_say_where_they_come_from():
    files = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"format", "device", "date", "commands", "versions", "sections"} <= set(result)
        assert {"torch", "triton", "diffusers", "tilewise"} <= set(result["versions"])
        assert path == results.path_of(result, path.parent)
        assert not any(row.get("wrong") for section in result["sections"].values() for row in section)


def test_every_table_is_made_of_the_result(tiny_run):
    result, printed, _ = tiny_run
    text = render.tables(result)
    assert printed.strip().split("\nwritten:")[0].endswith(text.splitlines()[-1])
    (sta,) = (row for row in result["sections"]["attention"] if row["name"] == "tiny STA")
    ours, sdpa = (next(r for r in sta["implementations"] if r["name"] == name) for name in ("torch", "sdpa"))
    (line,) = (line for line in text.splitlines() if line.startswith("| tiny STA |") and "(torch)" in line)
    shown = float(line.split(" ± ")[0].rsplit("| ", 1)[1])
    assert shown == pytest.approx(ours["ms"], rel=1e-3, abs=1e-3)
    assert f"| {sdpa['ms'] / ours['ms']:.2f} |" in line
    assert "| 0.500 | 1.00 |" in line  # density; blocks are the mask
    for name in ("stock", "tilewise, STA density 0.2", "tilewise, dense, torch.compile"):
        assert f"| {name} |" in text
    assert "cuDNN not run: RuntimeError" in text
    assert "| tiny VAE, decode 12 frames 32×48 | tilewise |" in text
    assert "| tiny 16×16, window 4, end to end, changes of the prompt | tilewise, STA density 0.3, CUDA graph |" in text


def test_a_marker_picks_tables(tiny_run, monkeypatch):
    result, _, folder = tiny_run
    (folder / "benchmarks" / "results").mkdir(parents=True)
    (folder / "benchmarks" / "results" / "a.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(render, "ROOT", folder)
    page = "before\n<!-- results a.json {} -->\nold\n<!-- /results -->\nafter"
    text = render.rendered(page.format("fused"))
    assert text.startswith("before\n<!-- results a.json fused -->\n") and text.endswith("<!-- /results -->\nafter")
    assert "| operation |" in text and "denoiser forward" not in text and "old" not in text
    assert render.rendered(text) == text
    with pytest.raises(ValueError, match="no such table"):
        render.rendered(page.format("fusde"))


def _result(section: str, *names: str, **changes) -> dict:
    made = [{"name": name, "order": order, "ms": len(names)} for order, name in enumerate(names)]
    identity = {"format": results.FORMAT, "device": "d", "date": "2026-01-01", "tiny": False, "commands": [section]}
    return {**identity, "versions": {"torch": "1"}, "sections": {section: made}, **changes}


def test_a_part_replaces_its_rows_and_keeps_the_others(tmp_path):
    results.write(_result("attention", "a", "b", "c"), tmp_path)
    part = _result("attention", "b", commands=["again"])
    part["sections"]["attention"][0]["order"] = 1
    results.write(part, tmp_path)
    path = results.write(_result("step", "s"), tmp_path)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["name"], row["ms"]) for row in result["sections"]["attention"]] == [("a", 3), ("b", 1), ("c", 3)]
    assert [row["name"] for row in result["sections"]["step"]] == ["s"]
    assert result["commands"] == ["attention", "again", "step"]


@pytest.mark.parametrize("changes", [{"format": 1}, {"versions": {"torch": "2"}}])
def test_results_that_do_not_belong_together_are_not_mixed(tmp_path, changes):
    path = results.write(_result("attention", "a", **changes), tmp_path)
    before = path.read_text(encoding="utf-8")
    with pytest.raises(results.MismatchError, match="cannot stand in one file"):
        results.write(_result("attention", "a"), tmp_path)
    assert path.read_text(encoding="utf-8") == before


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_row_is_checked_and_timed(tiny_run):
    result, *_ = tiny_run
    found = result["sections"]["attention"]
    assert [row["name"] for row in found] == list(TINY)
    for row in found:
        kinds = {"torch": "ours", "sdpa": "dense"} | {f"flex, {order}": "sparse" for order in TINY[row["name"]].flex}
        assert {r["name"]: r["kind"] for r in row["implementations"]} == kinds, row["missing"]
        assert all(
            r["ms_min"] <= r["ms"] <= r["ms_max"] and 0 <= r["relative_error"] < 1e-5 for r in row["implementations"]
        )
        assert not row["wrong"] and 0 < row["density"] <= row["work"] + 1e-12


@pytest.mark.parametrize("row", rows.TINY_ROWS, ids=lambda row: row.name)
def test_the_reference_mask_is_the_plan(row):
    layout = row.method.layout(row.grid)
    mask = row.method.plan(layout, row.heads, CPU).to_mask(row.heads)[0]
    for head in range(row.heads):
        assert torch.equal(rows.visible(row, layout, layout.coords, head, torch.arange(row.grid.tokens)), mask[head])


def test_a_wrong_result_is_not_timed():
    row = TINY["tiny STA + 40 text"]
    layout = row.method.layout(row.grid)
    q, k, v = (torch.randn(1, row.grid.tokens, 2, 32) for _ in range(3))
    mask = lambda head, queries: rows.visible(row, layout, layout.coords, head, queries)  # noqa: E731
    out = attention.block_sparse_attention(q, k, v, row.method.plan(layout, 2, CPU))
    assert attention.check(out, q, k, v, mask, 1e-5) < 1e-5
    # A wrong mask, a wrong last row of the last head, not a number, and another shape.
    spoilt = out.clone()
    spoilt[0, -1, -1] += 1
    for bad, seen in ((out, None), (spoilt, mask), (out * torch.nan, mask), (out[:, 1:], mask)):
        with pytest.raises(attention.WrongResultError, match="wrong result"):
            attention.check(bad, q, k, v, seen, 1e-5)


def test_an_own_wrong_result_is_reported_and_a_peer_that_fails_is_named(monkeypatch):
    def broken(device):
        def peer(q, k, v):
            raise RuntimeError("no such kernel\nand more")

        return {"peer": peer}, {"other": "ImportError: not installed"}

    monkeypatch.setattr(attention.peers, "dense_peers", broken)
    monkeypatch.setattr(attention, "block_sparse_attention", lambda q, k, v, plan, backend: torch.zeros_like(q))
    (result,) = attention.run(CPU, 0.001, [TINY["tiny full window"]])
    assert result["wrong"] == ["torch"] and not result["implementations"]
    assert result["missing"]["peer"] == "RuntimeError: no such kernel"
    assert result["missing"]["other"] == "ImportError: not installed"
    text = render.tables({"sections": {"attention": [{**result, "order": 0}]}}, header=False)
    assert "peer not run: RuntimeError: no such kernel" in text


def test_dense_peers_are_timed_once_for_a_shape(monkeypatch):
    calls = []
    monkeypatch.setattr(attention.peers, "dense_peers", lambda device: calls.append(device) or ({}, {"x": "absent"}))
    found = list(attention.run(CPU, 0.001, [TINY["tiny full window"], TINY["tiny neighborhood"]]))
    assert len(calls) == 1
    assert all(row["missing"] == {"x": "absent"} for row in found)


@pytest.mark.parametrize("order", flex.ORDERS)
@pytest.mark.parametrize(
    "row",
    [
        rows.Row("tiles", Grid(3, 10, 13), 1, 16, STA(window=(1, 2, 2), tile=(2, 4, 5))),
        rows.Row("tokens", Grid(3, 10, 13), 1, 16, rows.TokenWindow((3, 4, 6), (1, 3, 1), (3, 5, 5))),
    ],
    ids=lambda row: row.name,
)
def test_flex_has_the_same_mask(row, order):
    layout = row.method.layout(row.grid)
    mask = flex.mask_mod(row, layout, order, CPU)
    at = torch.arange(row.grid.tokens)
    coords = layout.coords if order == "tile order" else layout.coords[:, layout.inverse]
    want = rows.visible(row, layout, coords, 0, at)
    assert torch.equal(mask(None, None, at[:, None], at[None]), want)
    # The lists that are counted in pieces are those of the library.
    mine = flex.block_mask(mask, row.grid.tokens, CPU)
    theirs = create_block_mask(mask, None, None, row.grid.tokens, row.grid.tokens, device="cpu")
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    assert torch.equal(mine.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(mine.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert flex.computed(mine) >= want.float().mean()


def test_flex_refuses_what_it_is_not_written_for():
    for name in ("tiny STA + 40 text", "tiny STA, windows mixed over heads", "tiny full window"):
        row = TINY[name]
        with pytest.raises(ValueError, match=r"flex: .*tiny"):
            flex.mask_mod(row, row.method.layout(row.grid), "tile order", CPU)


# ── whole forwards, profiles, timing ─────────────────────────────────────────────────────────────────────────────────


def test_every_variant_of_the_step_runs(tiny_run):
    result, *_ = tiny_run
    (row,) = result["sections"]["step"]
    names = [variant["name"] for variant in row["variants"]]
    assert names[:2] == ["stock", "stock, torch.compile"]
    on_a_cpu = set(step.METHODS) - set(step.EIGHT_BITS)
    assert {*on_a_cpu, f"{step.LOOKED_INTO}, torch.compile", "tilewise, dense, torch.compile"} <= set(names)
    assert list(row["missing"]) == ["stock, cuDNN"]  # there is none on a CPU
    by_name = {variant["name"]: variant for variant in row["variants"]}
    assert by_name[step.LOOKED_INTO]["density"] <= 0.2
    assert by_name["tilewise, dense"]["relative_error"] < 1e-5
    assert {step.NATIVE, step.LOOKED_INTO} <= set(row["time"])
    for spent in row["time"].values():
        assert set(spent["ms"]) == set(profiling.GROUPS)
        assert spent["ms"][profiling.ATTENTION] > 0 and spent["ms"][profiling.MATMUL] > 0


def test_a_model_has_the_dtypes_of_a_loaded_one(tmp_path):
    from diffusers import WanTransformer3DModel

    model = step.build(step.CONFIGS["tiny"], CPU, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    want = {name: x.dtype for name, x in [*loaded.named_parameters(), *loaded.named_buffers()]}
    assert {name: x.dtype for name, x in [*model.named_parameters(), *model.named_buffers()]} == want
    assert set(want.values()) == {torch.bfloat16, torch.float32}


@pytest.mark.compile
def test_warming_up_and_compiling_leave_the_model_as_it_was():
    model = step.build(step.CONFIGS["tiny"], CPU, torch.float32)
    blocks = model.blocks
    with shortened(model, lambda _: 2), step.compiled(model, "eager"):
        assert len(model.blocks) == 2
        assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert model.blocks is blocks
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_windows_of_a_stream_are_measured(tiny_run):
    result, printed, _ = tiny_run
    (work,) = streaming_windows.TINY
    (row,) = (one for one in result["sections"]["streaming"] if one["name"] == work.name)
    stock, sparse = row["variants"]
    assert (stock["runs"], sparse["runs"], stock["frames"]) == (2, work.windows, 2 * 8 * (work.window - work.overlap))
    assert stock["density"] == 1 > sparse["density"] and not sparse["fallbacks"] and row["missing"] == {}
    assert work.name in printed


def test_every_family_is_measured_and_a_full_window_is_stock(tiny_run):
    result, *_ = tiny_run
    found = result["sections"]["families"]
    assert [row["name"] for row in found] == [work.name for work in families.TINY]
    for row in found:
        assert list(row["missing"]) == ["stock, cuDNN"]  # there is none on a CPU
        stock, dense, sparse = row["variants"]
        assert (stock["name"], dense["name"]) == ("stock", "tilewise, dense")
        assert dense["relative_error"] < 1e-5 and sparse["relative_error"] < 1e-5
        assert sparse["window_changes"] > 1e-2, "the window must matter"
        assert sparse["density"] < 0.6 and any(kind.startswith("sparse, ") for kind in sparse["calls"])
        assert sparse["over"]["stock"] == pytest.approx(stock["ms"] / sparse["ms"])
    text = render.families_table(found)
    assert text.count("| tiny ") == len(families.TINY) and text.count("full window ") == len(families.TINY)


def test_a_family_that_differs_from_stock_is_reported(monkeypatch):
    work = next(work for work in families.TINY if "LTX" in work.name)
    model = work.build(CPU, torch.float32)
    small = families.Work(**{**vars(work), "method": families.tilewise.STA(window=(1, 1, 1), tile=(2, 3, 3))})
    monkeypatch.setattr(families, "EVERYTHING", (1, 2, 1))
    row = families.run_work(small, model, CPU, torch.float32, 0.001)
    assert row["wrong"] == ["tilewise, full window: difference from stock nan"]
    blocks = model.transformer_blocks
    with shortened(model, lambda _: 1):
        assert len(model.transformer_blocks) == 1
    assert model.transformer_blocks is blocks and not families.tilewise.is_patched(model)


def test_full_size_rows_are_published_configs():
    """The widths of the released models, on meta tensors: numbers of parameters of a layer, times all layers."""
    published = {"Flux.1 4096²": 11.9e9, "SDXL 1024², two samples": 2.57e9, "LTX-Video 161×704×1216": 1.92e9}
    published["CogVideoX-5B 49×480×720"] = 5.57e9
    for work in families.WORKS:
        if work.name in published:
            with torch.device("meta"):
                model = getattr(__import__("diffusers"), work.model)(**work.config)
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(published[work.name], rel=0.01)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false>>", "attention"),
        ("forward_kernel", "attention"),
        ("hopper_kernel", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_tn_align8>", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matmul"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "elementwise"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, true>", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, at::native::MeanOps>", "elementwise"),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long>", "elementwise"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_addmm_mul_3", "elementwise"),
        ("triton_red_fused__to_copy_add_native_layer_norm_0", "elementwise"),
        ("qk_norm_rope_kernel", "elementwise"),
        ("residual_norm_kernel", "elementwise"),
        ("reorder_kernel", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "other"),
        ("sm80_xmma_fprop_implicit_gemm_bf16_conv3d_nhwc_tn_n", "other"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_grouped_by_name(kernel, group):
    assert group in profiling.group_of(kernel)


def test_the_sweep_overrides_the_rules_and_keeps_what_fails(monkeypatch):
    from tilewise.kernels.attention.backends import triton as kernel
    from tilewise.kernels.attention.backends.torch import torch_forward

    def forward(q, k, v, plan, scale):
        config = kernel.launch_config(q.shape[3], plan.block, q.element_size(), False, CHIPS["sm_90"])
        if config["num_stages"] == 7:
            raise RuntimeError("out of shared memory")
        assert config["BLOCK_D"] == q.shape[3]  # what is not swept stays as the rule has it
        return torch_forward(q, k, v, plan, scale)

    monkeypatch.setattr(kernel, "triton_forward", forward)
    row = launch.run_row(TINY["tiny STA"], CPU, 0.0)
    by_rule, *swept = row["configs"]
    assert by_rule["rule"] and not any(config["rule"] for config in swept)
    assert [(c["BLOCK_M"], c["BLOCK_N"], c["num_warps"], c["num_stages"]) for c in swept] == launch.CONFIGS
    assert {c["num_stages"] for c in swept if "error" in c} == {7}
    assert all(c["ms"] > 0 and c["tflops"] > 0 for c in swept if "error" not in c)
    table = render.launch_table([row])
    assert table.count("swept") == 4 and table.count("by rule") == 1


def test_measure_gives_the_median_and_its_spread():
    durations = iter([0.0, 0.03, 0.0, 0.01, *[0.01] * 300])
    import time

    timing = measure(lambda: time.sleep(next(durations)), CPU, seconds=0, warmup=1)
    assert timing.runs == 3 and timing.low < 10 <= timing.median < 25 and timing.high >= 30


def test_fused_operations_are_compared_with_the_separate_ones(tiny_run, monkeypatch):
    result, *_ = tiny_run
    found = result["sections"]["fused"]
    assert [row["name"] for row in found] == [f"tiny: {operation.name}" for operation in fused.OPERATIONS]
    for row in found:
        assert [r["name"] for r in row["implementations"]] == ["eager", "torch.compile", "tilewise"], row["missing"]
        assert all(r["relative_error"] < 1e-5 and r["gbps"] > 0 for r in row["implementations"])
    operation = fused.OPERATIONS[2]
    broken = fused.Operation(operation.name, operation.inputs, lambda h, y, g: h, operation.eager)
    (row,) = fused.run(CPU, 0.001, [(fused.TINY[0], broken)], "eager")
    assert row["wrong"] == ["tilewise"] and "wrong result" in row["missing"]["tilewise"]


def test_gpus_table():
    """A variant that ran on one GPU alone has no speed-up; one without a patch no balance."""
    timing = {"ms": 100.0, "ms_min": 99.0, "ms_max": 101.0, "peak_gib": 3.0}
    split = {**timing, "ms": 52.0, "density": 0.25, "balance": 1.01, "exchange_share": 0.07}
    variants = [
        {"name": "stock, cuDNN", "one": timing},
        {"name": "ours", "one": timing, "split": split, "speed_up": 100 / 52, "over_stock_split": 2.0, "error": 0.001},
    ]
    row = {"name": "Wan, 2 GPUs", "layers": 4, "gpu_variants": variants, "missing": {}}
    lines = render.gpus_table([row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 100.0 ± 1.0 | – | – | – | – | – | 3.0 / – | – |" in lines[2]
    assert "| 1.92 | 2.00 | 7.0% | 1.010 | 3.0 / 3.0 | 1.0e-03 |" in lines[3]


def test_unets_run_through_the_published_schedule(tmp_path, capsys):
    unets.main("cpu", "", 0.01, True, tmp_path)
    (file,) = tmp_path.glob("*-tiny.json")
    (row,) = json.loads(file.read_text("utf-8"))["sections"]["unets"]
    assert row["states"] == {"coarse conv": 8, "coarse level": 12, "usual": 30} and not row["missing"]
    ms = {name: found["ms"] for name, found in row["forwards"].items()}
    want = 8 * ms["windows, coarse conv"] + 12 * ms["windows, coarse level"] + 30 * ms["windows, usual"]
    assert row["runs"]["hidiffusion"] == pytest.approx(want / 1000)
    assert f"| {want / 1000:.1f} |" in render.unets_table([row])
    assert "hidiffusion, 50 steps" in capsys.readouterr().out


def test_peaks_of_memory(tmp_path, capsys):
    memory.main("cpu", 1.0, True, tmp_path)
    (file,) = tmp_path.glob("*-tiny.json")
    (row,) = json.loads(file.read_text("utf-8"))["sections"]["memory"]
    assert not row["missing"] and [one["name"] for one in row["peaks"]] == [memory.STOCK, *memory.METHODS]
    assert all(one["first"] > 0 and one["over_stock"] > 0 for one in row["peaks"])
    assert "1.000 × stock" in capsys.readouterr().out
