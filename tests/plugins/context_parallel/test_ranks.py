"""A denoiser split over 2, 3 and 4 processes equals one process, with every family and method, and what cannot run says so."""

from __future__ import annotations

import re
from typing import Any

import cfg_cases
import compose_cases
import family_cases_split
import forked_ranks
import pytest
import torch
import wan_cases

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.context_parallel.head_dealing import balance, deal
from tilewise.plugins.context_parallel.token_shares import segments_of, shares_of, split
from tilewise.plugins.methods.draft import Draft

pytestmark = pytest.mark.slow
WAN = wan_cases.cases()
CFG = cfg_cases.cases()
CASES = WAN | family_cases_split.cases() | compose_cases.cases() | CFG
RUNS = [f"{name}, {n} ranks" for name, case in CASES.items() for n in getattr(case, "ranks", (2, 3, 4))]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return forked_ranks.run_cases("wan_cases,family_cases_split,compose_cases,cfg_cases,page_cases", 4)


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith(("error", "refused", "CFG", "row"))])
def test_ranks_equal_one_process(found, name):
    assert found[name]["error"] is not None, found[name]["said"]
    assert found[name]["error"] <= 1e-5
    for said in found[name]["said"]:
        assert ("sparse" in said["kinds"]) == ("dense," not in name)
        one = found["one process"][name.rpartition(", ")[0]]
        assert said["calls"] == one["calls"]
        assert said.get("skipped") == one.get("skipped") and one.get("skipped") != 0
        assert re.search("context parallelism, (denoiser|transformer): rank", said["text"])


@pytest.mark.parametrize("name", [name for name in RUNS if "unequal heads" in name])
def test_heads_are_dealt_by_what_they_kept_in_the_last_forward(found, name):
    first, second = found[name]["said"]
    assert first["balance"] == second["balance"]
    unknown, in_order, dealt = first["balance"]
    assert unknown is None and 1 <= dealt < 1.15 < 1.3 < in_order
    for said in (first, second):
        assert "heads 2 of 4; 4 exchanges" in said["text"]
        assert f"busiest rank ÷ mean: {dealt:.3f}, heads dealt by what they kept in the forward before" in said["text"]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("CFG")])
def test_halves_with_a_branch_of_guidance_each_equal_one_process(found, name):
    case, _, ranks = name.rpartition(", ")
    each, one = found[name]["said"], found["one process"][case]
    assert found[name]["error"] is not None, each
    assert found[name]["error"] <= 1e-5
    if case == "CFG unpatched":
        return
    if case == "CFG highres":
        assert sum(half["calls"] for half in each) == one["calls"]
        assert ["global path" in half["kinds"] for half in each] == [True, False]
        return
    halves = [each[0], each[int(ranks[0]) // 2]]
    batched = "batch" in case or "LTX" in case
    whole = batched and "Mochi" not in case  # whose prompts of different lengths are a call each
    assert [half["calls"] for half in halves] == [one["calls"] if whole else one["calls"] // 2] * 2
    for half, part in zip(halves, ("first", "second"), strict=True):
        assert ("sparse" in half["kinds"]) == ("dense" not in case)
        assert f"the {part} {'half of each batch' if batched else 'forward of each step'}; " in half["text"]
    if not batched:  # the branches of one process, in order
        assert sorted(one["seen"]) == sorted(halves[0]["seen"] + halves[1]["seen"]) or "halves" in case
        assert {branch for _, branch in halves[0]["seen"]} == {0} and {branch for _, branch in halves[1]["seen"]} == {1}
        assert halves[0]["reused"] + halves[1]["reused"] == one["reused"]
        assert one["reused"] or "cache" not in case


def test_a_row_of_the_benchmark_with_guidance(found):
    each = found["row: benchmark, 2 ranks"]["said"]
    for row in each:
        assert (row["gpus"], row["missing"], row["wrong"]) == (2, {}, [])
        assert [variant["name"] for variant in row["gpu_variants"]] == [
            "tilewise, dense",
            "tilewise, STA window (3,3,3)",
        ]
        for variant in row["gpu_variants"]:
            assert variant["error"] <= 1e-5 and variant["speed_up"] > 0
            assert variant["split"]["density"] == pytest.approx(variant["one"]["density"])
            assert 0 < variant["split"]["exchange_share"] < 1 <= variant["split"]["balance"] <= 2


@pytest.mark.parametrize("name", ["two paths", "two paths, split within"])
def test_each_rank_keeps_what_the_global_path_gave_for_its_tokens(found, name):
    one = found["one process"][name]
    for said in found[f"{name}, 2 ranks"]["said"]:
        assert said["paths"] == one["paths"] == [2, 1]
        assert said["kept"] == one["kept"] // 2 > 0


def test_jobs_of_the_page(found):
    first, others = found["row: page, 2 ranks"]["said"]
    one = found["one process"]["row: page"]
    assert first["frames"] == one["frames"] and first["files"] == one["files"] == 2
    assert (first["run"], others) == ({"gpus": 2, "parallel": "context"}, ["loaded"])
    assert (first["clip"], first["cancelled"], first["again"]) == (["done", None], ["cancelled", None], ["done", None])
    assert first["fails"][0] == first["cache"][0] == "failed"  # and the page goes on
    assert "select='shared' chooses among the pairs of all heads" in first["fails"][1]
    assert "--cache cannot be used with 2 processes" in first["cache"][1]
    assert "this page makes clips by 2 processes together" in first["refused"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("too_many_ranks, 3", "ConfigError: .* each needs a head, and denoiser has 2"),
        ("uneven, 2", "TilewiseError: denoiser: 175 tokens of the grid 5×7×5 cannot be split evenly over 2 ranks"),
        (
            "other_methods, 2",
            "TilewiseError: denoiser: the ranks differ; rank . of 2 has method .*Patch the denoiser alike",
        ),
        ("ring, 2", "FallbackError: .*ring_degree=2 splits the keys"),
        ("all_heads_needed, 2", "FallbackError: .*select='shared' chooses among the pairs of all heads"),
        ("FramePack, 2", "UnsupportedModelError: .*its history frames join the sequence"),
        ("Animate, 2", "UnsupportedModelError: .*its face adapters attend frame by frame"),
        ("Allegro, 2", "UnsupportedModelError: .*positions and masks of the whole sequence"),
        ("Cosmos of one block, 2", "UnsupportedModelError: .*it has one block"),
        ("Z-Image, 2", "UnsupportedModelError: .*joins text and image sample by sample"),
        ("controlnet, 2", "TilewiseError: .*block_controlnet_hidden_states of SD3Transformer2DModel .*of all tokens"),
        (
            "short_text, 2",
            "TilewiseError: denoiser: 1 tokens of the grid .* cannot be split over 2 ranks.* a longer prompt",
        ),
        ("unpatched, 2", "TilewiseError: .*its stock attention does not exchange tokens"),
        (
            "with_measuring_cache, 2",
            "UnsupportedModelError: cache mag: .*calibrate=true would measure the part of each",
        ),
        ("with_measuring_cache_before, 2", "UnsupportedModelError: cache mag: .*would measure the part of each"),
        ("with_sea_cache, 2", "UnsupportedModelError: cache sea: .*goes by whole sequences"),
        (
            "two_paths_pooled, 2",
            "UnsupportedModelError: two paths: .*a global path that is pooled sees whole sequences",
        ),
        ("two_paths_of_joint_text, 2", "UnsupportedModelError: two paths: .*gives to text in the sequence"),
        ("stream, 2", "UnsupportedModelError: stream: .*a stream is made by one process"),
        ("calibrate, 2", "UnsupportedModelError: calibrate: .*a process has some heads"),
        ("guidance_off, 2", "TilewiseError: CFG parallelism, transformer: .* guidance is off .*read by mul"),
        ("odd_batch, 2", "ConfigError: CFG parallelism, denoiser: a batch of 1 cannot be halved.* guidance is off"),
        ("drift, 2", "FallbackError: .*drift goes by the recall of a whole batch"),
        ("cfg_twice, 2", "ConfigError: CFG parallelism: denoiser is divided between processes already"),
        ("cfg_after_a_cache, 2", "ConfigError: CFG parallelism: a step cache has hooks on transformer itself"),
        ("cfg_stream, 2", "UnsupportedModelError: stream: CFG parallelism divides .*a stream is made by one process"),
        ("twice, 2", "ConfigError: context parallelism: it is enabled on denoiser already"),
    ],
)
def test_what_cannot_run_says_so_on_every_rank(found, name, expected):
    said = next(
        found[f"{kind}: {name} ranks"]["said"] for kind in ("error", "refused") if f"{kind}: {name} ranks" in found
    )
    assert len(said) == int(name[-1])
    for line in said:
        assert re.match(expected, line), line


def test_one_process_without_torchrun():
    with pytest.raises(tilewise.ConfigError, match="torchrun --nproc-per-node"):
        tilewise.enable_context_parallel(wan_cases.tiny_wan.tiny_transformer())


@pytest.mark.parametrize("grid", [Grid(1, 3, 5, 4, True), Grid(1, 3, 5, 4), Grid(1, 3, 5, 9, True, 5), Grid(2, 3, 5)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_tokens_of_the_ranks_in_the_order_of_the_model(grid, ranks):
    pieces = torch.arange(grid.tokens).split(segments_of(grid))
    local = [torch.cat([piece.tensor_split(ranks)[rank] for piece in pieces]) for rank in range(ranks)]
    shares = shares_of(segments_of(grid), grid, tuple(map(len, local)))
    joined = torch.cat(local)
    assert not isinstance(shares, str)
    if shares.order is not None:
        assert torch.equal(joined[shares.order.order][shares.order.inverse], joined)
        joined = joined[shares.order.order]
    assert torch.equal(joined, torch.arange(grid.tokens))


def test_heads_are_dealt_by_their_work():
    assert deal(5, 2) == deal(5, 2, (0.3,) * 5) == (range(0, 3), range(3, 5))
    costs = (1.0, 0.9, 0.1, 0.1, 0.5, 0.4)
    dealt = deal(6, 2, costs)
    assert sorted(head for heads in dealt for head in heads) == list(range(6))
    assert [len(heads) for heads in dealt] == [3, 3]
    assert max(sum(costs[head] for head in heads) for heads in dealt) == pytest.approx(1.5)
    assert balance(dealt, costs) == pytest.approx(1.0) and balance(deal(6, 2), costs) == pytest.approx(2 / 1.5)
    assert [len(heads) for heads in deal(4, 3, (1.0, 1.0, 0.2, 0.1))] == [1, 1, 2]  # the cheap ones share a rank
    assert balance(deal(12, 8)) == pytest.approx(2 / 1.5)


def test_tokens_that_are_split_otherwise_are_told():
    grid = Grid(1, 3, 5, 4, True)
    assert isinstance(shares_of(segments_of(grid), grid, (19, 0)), str)
    assert split(19, 2) == (10, 9)


def test_explain_says_what_each_gpu_has():
    model = wan_cases.tiny_wan.tiny_transformer(num_attention_heads=4)
    size = {"height": 112, "width": 80, "frames": 17, "num_inference_steps": 4}
    found = tilewise.explain(model, **size, method=wan_cases.METHODS["sta, a window a head"], gpus=3)
    (rank,) = found.ranks
    assert (rank.heads, sum(rank.tokens)) == ((1, 1, 2), found.rows[0].tokens)
    assert sum(heads * density for heads, density in zip(rank.heads, rank.density, strict=True)) / 4 == pytest.approx(
        found.density
    )
    assert "denoiser on 3 GPUs, a GPU: 1 to 2 of 4 heads" in str(found)
    assert found.to_dict()["ranks"][0]["heads"] == [1, 1, 2]
    assert tilewise.explain(model, **size, method="sta").ranks == ()
    halves = tilewise.explain(model, **size, method=wan_cases.METHODS["sta, a window a head"], gpus=4, parallel="cfg")
    assert (halves.ranks[0].heads, halves.ranks[0].branches) == ((2, 2), 2)
    assert "denoiser on 4 GPUs, a GPU: one branch of guidance, 2 of 4 heads" in str(halves)
    two = tilewise.explain(model, **size, method=Draft(select="shared", min_tokens=0), gpus=2, parallel="cfg")
    assert two.ranks[0].heads == (4,) and not any("fall back" in note for note in two.notes)
    model.register_to_config(guidance_embeds=True)
    distilled = tilewise.explain(model, **size, method="sta", gpus=2, parallel="cfg")
    assert any("takes guidance as an input" in note for note in distilled.notes)
    with pytest.raises(tilewise.ConfigError, match="unknown value of parallel 'both'"):
        tilewise.explain(model, **size, method="sta", gpus=2, parallel="both")
    with pytest.raises(tilewise.ConfigError, match="an even number of processes"):
        tilewise.explain(model, **size, method="sta", gpus=3, parallel="cfg")
    with pytest.raises(tilewise.ConfigError, match="over 5 ranks"):
        tilewise.explain(model, **size, method="sta", gpus=5)
    shared = tilewise.explain(model, **size, method=Draft(select="shared", min_tokens=0), gpus=2)
    assert any("every call would fall back: select='shared'" in note for note in shared.notes)
