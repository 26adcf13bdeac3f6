"""Configs, presets, the STA options, and what is said to those that cannot be."""

from __future__ import annotations

import json

import pytest
import torch

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.loading.load import load_skeleton
from tilewise.plugins import explain as explaining
from tilewise.plugins.config import Config, resolve, select_blocks
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.sta import STA, axis_density, choose_tile, choose_window


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("stta", "unknown method or preset 'stta'. Did you mean 'sta'"),
        ("sta-balance", "Did you mean 'sta-balanced'"),
        (3, "must be a name"),
        (Config, "must be a name"),
    ],
)
def test_unknown_methods(method, says):
    with pytest.raises(tilewise.ConfigError) as caught:
        resolve(method)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": (0, 3, 3)}, "at least 1"),
        ({"window": (3, 3)}, "three whole numbers"),
        ({"window": (3, 3, 2.5)}, "three whole numbers"),
        ({"window": ((3, 3, 3), (1, 0, 1))}, "window of head 1"),
        ({"tile": (1, 2, 3, 4)}, "three whole numbers"),
        ({"density": 0.0}, r"in (0, 1]"),
        ({"density": 1.5}, r"in (0, 1]"),
        ({"density": "0.5"}, r"in (0, 1]"),
        ({"density": 0.5, "window": (3, 3, 3)}, "not both"),
    ],
)
def test_bad_sta_options(options, says):
    with pytest.raises(tilewise.ConfigError) as caught:
        STA(**options)
    assert says in str(caught.value)


@pytest.mark.parametrize("steps", [(0.5,), (0.5, 0.2), (-0.1, 1), (0, 1.2), "ab", "1", "::2", "1:a", "1:2,4", "", 3])
def test_bad_steps(steps):
    with pytest.raises(tilewise.ConfigError, match="steps must be"):
        Config(STA(), steps=steps)


def test_blocks():
    assert select_blocks(":", 4) == [0, 1, 2, 3]
    assert select_blocks("2:", 4) == [2, 3]
    assert select_blocks(":-1", 4) == [0, 1, 2]
    assert select_blocks("0, 2:4,-1", 6) == [0, 2, 3, 5]
    assert select_blocks("::2", 5) == [0, 2, 4]
    for bad in ("", "a", "1:2:3:4", "1,,2", "1.5"):
        with pytest.raises(tilewise.ConfigError, match="blocks: cannot read"):
            select_blocks(bad, 4)


@pytest.mark.parametrize(("total", "dense"), [(1, 1), (4, 1), (20, 5), (30, 8), (50, 13)])
def test_steps_as_a_fraction(total, dense):
    runs = [Config(STA(), steps=(0.25, 1.0)).runs_at(i, total) for i in range(total)]
    assert runs == [False] * dense + [True] * (total - dense)


@pytest.mark.parametrize(
    ("steps", "runs"),
    [
        ("1:", [1, 2, 3]),
        (":", [0, 1, 2, 3]),
        (" 1 : 3 ", [1, 2]),
        (":-1", [0, 1, 2]),
        ("-1:", [3]),
        ("9:", []),
        ("2:1", []),
    ],
)
def test_steps_by_number(steps, runs):
    config = Config(STA(), steps=steps)
    assert [i for i in range(4) if config.runs_at(i, 4)] == runs
    assert Config.from_dict(config.to_dict()) == config == resolve("sta", steps=steps)
    assert resolve("sta").with_options({"steps_sparse": steps}) == config


def test_steps_by_number_in_a_run(tiny_pipe):
    size = {"height": 64, "width": 64}
    tilewise.patch(tiny_pipe, STA(window=(1, 1, 1)), steps="1:")
    told = tilewise.explain(tiny_pipe, **size, frames=9, num_inference_steps=4)
    tiny_pipe(
        "a star",
        **size,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="latent",
        max_sequence_length=16,
    )
    calls = {row.kind: row.calls for row in tilewise.summary(tiny_pipe).rows}
    assert (told.sparse_steps, told.dense_steps) == (3, 1)
    assert calls == {"sparse": 3 * 2, "dense step": 2}
    told = tilewise.explain(tiny_pipe, **size, frames=9, num_inference_steps=4, steps="9:")
    assert "none of the 4 steps is within the steps 9:" in told.warnings[0]
    with torch.no_grad(), pytest.raises(tilewise.TilewiseError, match="give steps as fractions"):
        tiny_pipe.transformer(torch.zeros(1, 4, 5, 16, 16), torch.tensor([900.0]), torch.zeros(1, 4, 32))
    with (
        tilewise.patched(tiny_pipe.transformer, STA(window=(1, 1, 1)), steps=":"),
        torch.no_grad(),
    ):  # nobody has to count
        tiny_pipe.transformer(torch.zeros(1, 4, 5, 16, 16), torch.tensor([900.0]), torch.zeros(1, 4, 32))


def test_rounding_never_adds_a_step():
    assert sum(Config(STA(), steps=(0.1, 1.0)).runs_at(i, 30) for i in range(30)) == 27


@pytest.mark.parametrize("method", [*tilewise.presets(), *tilewise.methods()])
def test_saved_configs_load_equal(tmp_path, method):
    config = resolve(method, steps=(0.1, 0.9), blocks="1:", strict=True)
    tilewise.save_config(config, tmp_path / "c.json")
    assert tilewise.load_config(tmp_path / "c.json") == config
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_windows_a_head_survive_json(tmp_path):
    method = STA(window=((1, 2, 3), (3, 3, 3)), tile=(2, 4, 4))
    tilewise.save_config(method, tmp_path / "c.json")
    assert tilewise.load_config(tmp_path / "c.json").method == method


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{", "not a JSON file"),
        ({}, "the key 'method'"),
        ({"method": "sta", "step": [0, 1]}, "unknown config key 'step'. Did you mean 'steps'"),
        ({"method": {"name": "sta", "windows": [3, 3, 3]}}, "unknown option of method 'sta': 'windows'"),
        ({"method": {"name": "sat"}}, "unknown method 'sat'. Did you mean 'sta'"),
        ({"method": "sta", "blocks": 3}, "blocks must be a string"),
        ({"method": {"name": "sta", "window": [3, 3]}}, "three whole numbers"),
        ({"method": 3}, "method must be a name"),
    ],
)
def test_bad_config_files(tmp_path, data, says):
    path = tmp_path / "bad.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(tilewise.ConfigError) as caught:
        tilewise.load_config(path)
    assert says in str(caught.value)
    assert "bad.json" in str(caught.value)


def test_patch_options_go_on_top_of_a_config():
    config = resolve(Config(STA(), steps=(0.5, 1), blocks="2:"), blocks="3:")
    assert (config.steps, config.blocks, config.strict) == ((0.5, 1.0), "3:", False)


def test_the_papers_tile_on_the_papers_grid():
    assert choose_tile(Grid(30, 48, 80)) == (6, 8, 8)
    assert choose_tile(Grid(18, 48, 80)) == (6, 8, 8)


@pytest.mark.parametrize("shape", [(21, 30, 52), (21, 45, 80), (33, 45, 80), (9, 16, 16), (9, 32, 32), (1, 64, 64)])
def test_chosen_tiles_fill_their_blocks_and_leave_windows_room(shape):
    layout = STA().layout(Grid(*shape))
    assert layout.fill > 0.7
    assert all(count >= min(3, n) for count, n in zip(layout.tiles, shape, strict=True))


@pytest.mark.parametrize("density", [0.15, 0.2, 0.35, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(21, 30, 52), (33, 45, 80), (9, 16, 16)])
def test_density_picks_a_window_near_and_below(shape, density):
    method = STA(density=density)
    layout = method.layout(Grid(*shape))
    plan = method.plan(layout, 2, torch.device("cpu"))
    assert 0.6 * density < plan.density <= density + 1e-6
    window = choose_window(layout.grid.shape, layout.tile, density)
    product = 1.0
    for length, size, w in zip(layout.grid.shape, layout.tile, window, strict=True):
        product *= axis_density(length, size, w)
    assert plan.density == pytest.approx(product)


def test_explain_runs_nothing_and_agrees_with_summary(tiny_pipe):
    size = {"height": 64, "width": 64, "num_frames": 9}
    for module in tiny_pipe.transformer.modules():
        module.register_forward_hook(lambda *a: pytest.fail("explain ran the model"))
    told = tilewise.explain(tiny_pipe, **size, num_inference_steps=4, method="sta-fast", blocks="1:")
    assert not tilewise.is_patched(tiny_pipe)
    assert (told.sparse_steps, told.dense_steps) == (3, 1)
    row = told.rows[0]
    assert (row.grid, row.tokens, row.sparse_blocks, row.dense_blocks) == ("5×8×8", 320, "1", "0")
    json.dumps(told.to_dict())
    for module in tiny_pipe.transformer.modules():
        module._forward_hooks.clear()
    tilewise.patch(tiny_pipe, "sta-fast", blocks="1:")
    tiny_pipe("a star", **size, num_inference_steps=4, output_type="latent", max_sequence_length=16)
    ran = tilewise.summary(tiny_pipe)
    assert ran.density == pytest.approx(row.density)
    assert ran.grids == {"transformer": row.grid}
    json.dumps(ran.to_dict())
    assert "sparse" in str(ran)
    assert "5×8×8 = 320" in str(told)


def test_explain_names_the_nearest_size(tiny_pipe):
    with pytest.raises(tilewise.ConfigError) as caught:
        tilewise.explain(tiny_pipe, height=60, width=65, frames=8, method="sta")
    for said in ("height=60 must be a multiple of 16, the nearest is 64", "width=65", "frames=8 must be 2·k + 1"):
        assert said in str(caught.value)
    with pytest.raises(tilewise.ConfigError, match="not patched; give method="):
        tilewise.explain(tiny_pipe, height=64, width=64, frames=9)


def test_explain_says_what_would_stay_dense_and_why(tiny_pipe):
    size = {"height": 64, "width": 64, "frames": 9, "method": "sta", "num_inference_steps": 4}
    assert tilewise.explain(tiny_pipe, **size).rows[0].backend == "torch"
    tiny_pipe.transformer.blocks[0].attn1.processor = object()
    assert tilewise.explain(tiny_pipe, **size).notes == [
        "transformer.blocks.0.attn1 stays dense: its processor, object, cannot be taken over"
    ]
    row = tilewise.explain(tiny_pipe.to(torch.float64), **size).rows[0]
    assert row.backend == "stock"
    assert "every call would fall back: dtype must be" in row.backend_reason
    with pytest.raises(tilewise.ConfigError, match="num_inference_steps must be at least 1"):
        tilewise.explain(tiny_pipe, **{**size, "num_inference_steps": 0})


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (
            STA(),
            {"num_inference_steps": 1},
            "sta never runs: the only step is outside the part from 0.25 to 1 of the schedule",
        ),
        (STA(), {"steps": (0.5, 0.5)}, "sta never runs: none of the 4 steps is within the part from 0.5 to 0.5"),
        (tilewise.Draft(), {}, "draft never runs: 320 tokens, draft pays from 1024 on"),
        (tilewise.Config(STA(), min_tokens=1000), {}, "sta never runs: 320 tokens, fewer than min_tokens=1000"),
        (
            STA(window=(99, 99, 99)),
            {},
            "method dense computes the same with less work",
        ),
        (STA(window=(1, 1, 1)), {}, None),
        ("dense", {}, None),
    ],
)
def test_explain_warns_where_a_method_changes_nothing(tiny_pipe, method, options, words):
    options = {"num_inference_steps": 4, **options}
    told = tilewise.explain(tiny_pipe, height=64, width=64, frames=9, method=method, **options)
    if words is None:
        assert told.warnings == ()
        return
    assert len(told.warnings) == 1
    assert words in told.warnings[0]
    assert told.notes[0] == told.warnings[0]
    assert words in " ".join(str(told).split())
    assert told.to_dict()["warnings"] == list(told.warnings)


def test_explain_warns_where_a_kernel_computes_more_than_dense(tiny_pipe, monkeypatch):
    """Its blocks are padded: on a small grid a window of half of the pairs is more work than all of them."""
    monkeypatch.setattr(explaining, "expected_backend", lambda *_: ("triton", "the kernel"))
    told = tilewise.explain(tiny_pipe, height=64, width=64, frames=9, method="sta", num_inference_steps=4)
    assert told.rows[0].density < 0.6 and told.rows[0].work > 1
    assert "but its kernel computes 1.44 times as many as dense attention" in told.warnings[0]


def test_explain_counts_the_models_own_steps_and_says_so(tiny_pipe, tiny_pipe_dir):
    size = {"height": 64, "width": 64, "frames": 9, "method": "sta"}
    told = tilewise.explain(tiny_pipe, **size)
    assert told.sparse_steps + told.dense_steps == told.size["num_inference_steps"] == 50
    assert told.notes == ["steps are counted for 50, the model's own: num_inference_steps was not given"]
    assert tilewise.explain(load_skeleton(tiny_pipe_dir), **size).size["num_inference_steps"] == 4  # tilewise.json
    assert tilewise.explain(tiny_pipe, **size, num_inference_steps=4).notes == []


def test_frames_by_its_old_name(tiny_pipe):
    size = {"height": 64, "width": 64, "method": "sta", "num_inference_steps": 4}
    with pytest.warns(FutureWarning, match=r"explain\(num_frames=…\) is explain\(frames=…\) now"):
        told = tilewise.explain(tiny_pipe, **size, num_frames=9)
    assert told == tilewise.explain(tiny_pipe, **size, frames=9)
    assert told.size["frames"] == 9
    for wrong, words in (({"frames": 9, "num_frames": 9}, "give frames alone"), ({}, "explain needs frames=")):
        with pytest.raises(tilewise.ConfigError, match=words):
            tilewise.explain(tiny_pipe, **size, **wrong)


def test_a_summary_says_that_a_method_never_ran(tiny_pipe):
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1, "output_type": "latent"}
    for steps, ran in (((0.25, 1.0), False), ((0.0, 1.0), True)):
        with tilewise.patched(tiny_pipe, STA(window=(1, 1, 1)), steps=steps):
            tiny_pipe("a red circle", **call)
            report = tilewise.summary(tiny_pipe)
        assert report.ran == ran
        assert ("sta never ran: every call was dense" in str(report)) != ran


def test_a_tile_that_is_too_small_for_the_grid_is_refused():
    method = STA(tile=(1, 1, 1))
    with pytest.raises(tilewise.ConfigError, match="32760 blocks, more than 12288; give a larger tile"):
        method.plan(method.layout(Grid(21, 30, 52)), 12, torch.device("cpu"))


def test_what_resolve_takes_can_be_loaded_again():
    for wrong in ({"blocks": 1}, {"strict": 1}):
        with pytest.raises(tilewise.ConfigError, match="blocks must be a string and strict true or false"):
            resolve(STA(), **wrong)


def test_supported_models_lists_wan():
    models = tilewise.supported_models()
    assert "WanTransformer3DModel" in models["wan"]
    assert list(models) == sorted(models)


@pytest.mark.parametrize("method", [STA(), Draft(density=0.25), Draft(density=0.25, within=STA())])
def test_preparing_a_config_leaves_methods_that_need_nothing_as_they_are(method):
    config = Config(method, steps=(0.5, 1.0))
    assert config.prepare(object(), torch.nn.Identity()) == config


def test_preparing_a_config_prepares_the_method_inside_a_window():
    class Sized(STA):
        def prepare(self, target, denoiser):
            return STA(window=(1, 2, target))

    config = Config(Draft(density=0.25, within=Sized())).prepare(3, torch.nn.Identity())
    assert config.method.within == STA(window=(1, 2, 3))
