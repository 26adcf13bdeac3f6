"""``foreground``: where the object is, and which blocks its queries and the others keep, against plain loops."""

import pytest
import test_hunyuan_video as hunyuan
import torch
from chosen_blocks import blocks_of, planned, tensors

import tilewise
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.plans.layout import Grid
from tilewise.kernels.selection.select import GOLDEN
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.quality.content_detection import analyse
from tilewise.plugins.methods.base import make_method
from tilewise.plugins.methods.dynamic.word_maps import word_map
from tilewise.plugins.methods.published.foreground import densities, masked_blocks

TILE = (1, 4, 4)
MASK = ((0.0, 1.0, 1.0), (0.0, 0.0, 1.0))
GRIDS = [Grid(2, 9, 14), Grid(2, 9, 10, text=5, text_first=True)]


def masked(layout, mask):
    """The blocks by loops over their tokens."""
    found = []
    for start, rows, text in zip(
        layout.block_start.tolist(), layout.block_rows.tolist(), layout.is_text.tolist(), strict=True
    ):
        values = []
        for s in range(start, start + rows):
            _, y, x = layout.coords[:, s].tolist()
            values.append(0.0 if text else mask[y * len(mask) // layout.grid.h][x * len(mask[0]) // layout.grid.w])
        found.append(not text and sum(values) / rows >= 0.5)
    return found


def check(method, layout, qkv, place, part, density):
    """Each row keeps the best by its own density; place: (samples, blocks)."""
    grid, N, rows, text = layout.grid, layout.blocks, layout.block_rows.tolist(), layout.is_text.tolist()
    share = grid.text / grid.tokens
    of_rows = max((density - share) / (1 - share), 1 / grid.tokens)
    outside = of_rows / (part * method.boost + 1 - part)
    inside = method.boost * outside
    if inside > 1:
        inside, outside = 1.0, (of_rows - part) / (1 - part)
    logits = method.draft(layout, *qkv[:2], 0.25).logits
    kept = blocks_of(layout, planned(method, layout, *qkv).plan, 4)
    for b in range(2):
        for h in range(4):
            for i in range(N):
                wanted = [j for j in range(N) if i == j or text[j] or text[i]]
                aim = (inside if place[b][i] else outside) - (i * GOLDEN % 1) / N
                for j in sorted(range(N), key=lambda j: -float(logits[b, h, i, j])):
                    if sum(rows[j] for j in wanted) / grid.tokens < aim and j not in wanted:
                        wanted.append(j)
                assert set(kept[b, h, i].nonzero().flatten().tolist()) == set(wanted), (b, h, i)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("boost", [3.0, 1.0])
def test_a_mask(grid, boost):
    options = {"tile": TILE, "mask": MASK, "boost": boost, "density": 0.35, "compensate": False, "min_tokens": 0}
    method = make_method("foreground", options)
    layout = method.layout(grid)
    place = masked(layout, MASK)
    assert masked_blocks(layout, method.mask, torch.device("cpu")).tolist() == place
    assert 0 < sum(place) < sum(~layout.is_text)
    part = sum(n for n, there in zip(layout.block_rows.tolist(), place, strict=True) if there) / grid.video
    check(method, layout, tensors(grid), [place, place], part, 0.35)


def test_words():
    grid = Grid(2, 9, 10, text=7)
    method = make_method(
        "foreground",
        {"tile": TILE, "words": (2, 4), "share": 0.3, "density": 0.4, "compensate": False, "min_tokens": 0},
    )
    layout, (q, k, v) = method.layout(grid), tensors(grid)
    video = (~layout.is_text).nonzero().flatten().tolist()
    count, place = round(0.3 * len(video)), []
    starts = layout.block_start.tolist()
    for b in range(2):
        seen = {}
        for i in video:
            mean = q[b, starts[i] : starts[i] + int(layout.block_rows[i])].double().mean(0)
            heads = [(0.25 * k[b, grid.video :, h // 2].double() @ mean[h]).softmax(0)[2:5].sum() for h in range(4)]
            seen[i] = float(sum(heads))
        best = sorted(video, key=lambda i: -seen[i])[:count]
        place.append([i in best for i in range(layout.blocks)])
    assert place[0] != place[1]
    check(method, layout, (q, k, v), place, count / len(video), 0.4)


def test_the_whole_keeps_the_density():
    for density in (0.1, 0.5, 0.9):
        for part in (0.0, 0.2, 1.0):
            inside, outside = densities(density, part, 3.0)
            assert part * inside + (1 - part) * outside == pytest.approx(density)
            assert 0 < outside <= inside <= 1


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_a_word_map_is_the_softmax_written_out(kind):
    """Samples of two prompts, key heads that are shared, and a mask."""
    batch, length, heads, tokens = 4, 5, 4, 7
    q, k = torch.randn(batch, length, heads, 8), torch.randn(batch, tokens, 2, 8)
    hidden = torch.rand(batch, 1, 1, tokens) < 0.3
    hidden[..., 1:4] = False
    mask = {None: None, torch.bool: ~hidden, torch.float32: -3.0 * hidden}[kind]
    words = [[1, 2], [3]]
    found = word_map(q, k, mask, 0.4, words)
    for b in range(batch):
        for s in range(length):
            of_head = []
            for h in range(heads):
                scores = 0.4 * k[b, :, h // 2].double() @ q[b, s, h].double()
                if kind is torch.bool:
                    scores[hidden[b, 0, 0]] = -torch.inf
                elif kind is not None:
                    scores = scores - 3.0 * hidden[b, 0, 0]
                of_head.append(float(scores.softmax(0)[words[b // 2]].sum()))
            assert float(found[b, s]) == pytest.approx(sum(of_head) / heads, rel=1e-4)


def test_the_map_covers_the_object():
    """A drawn clip of the demo model's world, noisy: the quarter of the tokens that look at "circle" most holds the circle."""
    pipe = load_pipeline("demo", device="cpu")
    red, blue, size, frames = torch.tensor([0.86, 0.16, 0.16]), torch.tensor([0.16, 0.31, 0.86]), 96, 9
    y, x = torch.meshgrid(*[(torch.arange(size) * 2 + 1) / size - 1] * 2, indexing="ij")
    inside = torch.stack([(x + 0.5 - t / (frames - 1)) ** 2 + (y + 0.3) ** 2 < 0.09 for t in range(frames)])
    clip = torch.where(inside[..., None], red, blue)
    (seen,) = analyse(clip.numpy()).objects
    assert (seen.colour, seen.shape) == ("red", "circle")
    prompt, config = "a red circle moving right on a blue background", pipe.vae.config
    method = make_method("foreground", {"words": (2, 2), "min_tokens": 0, "tile": (1, 4, 4)})
    with torch.no_grad(), tilewise.patched(pipe.transformer, method, steps=(0.6, 1)):
        clean = pipe.vae.encode(clip.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mode()
        mean, std = (torch.tensor(n).view(1, -1, 1, 1, 1) for n in (config.latents_mean, config.latents_std))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        text, _ = pipe.encode_prompt(prompt, None, False, max_sequence_length=16, device="cpu")
        pipe.transformer(0.2 * (clean - mean) / std + 0.8 * noise, torch.tensor([800.0]), text)  # a dense step
        pipe.transformer(0.7 * (clean - mean) / std + 0.3 * noise, torch.tensor([300.0]), text)
        patch = pipe.transformer._tilewise
        found = patch.config.method._word_maps.of(patch.state.grid.tokens, 1)[0]
        assert "text tokens 2 to 2 read from cross-attention in 1 step" in str(tilewise.summary(pipe.transformer))
    grid = patch.state.grid
    centres = inside[[0, 2, 4, 6, 8]].float()  # the last frame of each latent one
    there = torch.nn.functional.avg_pool2d(centres, size // grid.h).flatten() > 0.5
    assert grid.t == 5 and 0.03 < there.float().mean() < 0.1
    looked = found >= found.topk(grid.tokens // 4).values[-1]
    assert (looked & there).sum() / there.sum() > 0.9 and found[there].mean() > 2 * found[~there].mean()


def clip_of(pipe, prompt, **more):
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, guidance_scale=3.0, output_type="latent", generator=generator, **size, **more).frames


def test_words_of_a_prompt(tiny_pipe):
    """Found in it by name, read in the dense step of the forward with the prompt, and used at the same density."""
    options = {"tile": TILE, "density": 0.4, "min_tokens": 0, "share": 0.3}
    stock = [block.attn2.processor for block in tiny_pipe.transformer.blocks]
    prompts, found = ["a red circle", "a circle and a red star"], []
    for words in (("red", "circle"), "circle", (2, 2)):
        method = make_method("foreground", {**options, "words": words})
        with tilewise.patched(tiny_pipe, method, steps="1:", strict=True):
            clip_of(tiny_pipe, prompts)
            state = tiny_pipe.transformer._tilewise
            (run,) = state.config.method._word_maps._runs.values()
            found.append((run.step, run.words))
            told = tilewise.summary(tiny_pipe)
            assert told.density == pytest.approx(0.4, abs=0.05)
            assert "read from cross-attention in 1 step" in str(told)
    assert found == [(0, [[1, 2], [1, 4]]), (0, [[2], [1]]), (0, [[2]])]
    assert [block.attn2.processor for block in tiny_pipe.transformer.blocks] == stock
    method = make_method(
        "foreground", {**options, "words": "circle", "boost": 1.0}
    )  # all blocks alike, wherever they look
    for steps in ("0:", "1:"):
        with tilewise.patched(tiny_pipe, method, steps=steps, strict=True):
            here = clip_of(tiny_pipe, "a red circle")
        with tilewise.patched(
            tiny_pipe, tilewise.Draft(density=0.4, tile=TILE, min_tokens=0, rank="mass"), steps=steps
        ):
            torch.testing.assert_close(here, clip_of(tiny_pipe, "a red circle"))


def test_words_that_cannot_be_found(tiny_pipe):
    method = make_method("foreground", {"words": "dog", "tile": TILE, "min_tokens": 0})
    with tilewise.patched(tiny_pipe, method):
        with pytest.raises(tilewise.ConfigError, match="the prompt 'a red circle' has no word 'dog'"):
            clip_of(tiny_pipe, "a red circle")
        with pytest.raises(tilewise.ConfigError, match=r"given none as text; give the numbers"):
            clip_of(
                tiny_pipe, None, prompt_embeds=torch.randn(1, 16, 32), negative_prompt_embeds=torch.randn(1, 16, 32)
            )
    joint = hunyuan.tiny(None)
    with pytest.raises(tilewise.ConfigError, match=r"no cross-attention over the prompt's own tokens, in which dog"):
        tilewise.patch(joint, method)
    assert not tilewise.is_patched(joint)


def test_fewer_text_tokens_than_the_words_are_refused():
    """Dense, counted, and with ``strict`` an error."""
    model = tiny_transformer(seed=1)
    inputs = {"hidden_states": torch.randn(1, 4, 5, 16, 16), "encoder_hidden_states": torch.randn(1, 4, 32)}
    method = make_method("foreground", {"words": (2, 4), "tile": (1, 2, 4), "min_tokens": 0})
    for strict in (False, True):
        with tilewise.patched(model, method, steps=(0.5, 1), strict=strict), torch.no_grad():
            model(**inputs, timestep=torch.tensor([800.0]))
            if strict:
                with pytest.raises(tilewise.FallbackError, match="cross-attention is over 4 tokens"):
                    model(**inputs, timestep=torch.tensor([300.0]))
            else:
                model(**inputs, timestep=torch.tensor([300.0]))
                assert "words name text token 4" in str(tilewise.summary(model).fallbacks)
    method = make_method("foreground", {"words": (2, 9), "tile": TILE, "min_tokens": 0})
    assert "give mask" in str(method.refuses_call(method.layout(Grid(2, 9, 10, text=7))))
