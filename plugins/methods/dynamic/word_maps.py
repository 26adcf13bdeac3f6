"""Where a model looks at some words of its prompt: a map of the video's tokens, read from cross-attention to the text.

    map[s] = mean over layers and heads of Σ_{k in words} softmax over text of scale · q_s·k

It is read in dense steps, in the forward with the prompt, and the last one counts: by then the layout of a clip is settled. Where
a run begins with a sparse step, that one is read too, and its own calls have no map yet.

Queries and keys are those that the model's own processor makes (answering_processor.py), its attention mask included.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tilewise.kernels.device import capturing
from tilewise.plugins.diffusers_compat import holds_both_prompts
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.hooks.answering_processor import answer_calls
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.text_format import counted
from tilewise.plugins.torch_compat import outside_graphs

if TYPE_CHECKING:
    from tilewise.plugins.runtime.forward_state import ForwardState

AT_ONCE = 256 * 2**20  # bytes of float32 scores that are made together


@dataclass
class _Run:
    """What was read in a run. step: in which. maps: (B, S) of each layer. words: text tokens of each prompt."""

    step: int = -1
    maps: dict[int, torch.Tensor] = field(default_factory=dict)
    words: list[list[int]] = field(default_factory=list)


class WordMaps:
    """The maps of one denoiser. words: text tokens by number (first, last), or words of the prompt.

    Attributes:
        short: why there are no maps: fewer text tokens than the numbers name; None: there is nothing to say.
    """

    def __init__(self, words: tuple[int, int] | tuple[str, ...], layers: Sequence[nn.Module]) -> None:
        self.words, self.layers = words, layers
        self.short: str | None = None
        self._state: Any = lambda: None
        self._runs: weakref.WeakKeyDictionary[Any, _Run] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._read = 0

    def put_on(self, state: ForwardState, handles: list[Any]) -> None:
        """Have the layers' calls read. Raises ConfigError where none of them can be."""
        self._state = weakref.ref(state)
        answered = 0
        for number, layer in enumerate(self.layers):
            found = answer_calls(layer, outside_graphs(self._answer(number)))
            if found is not None:
                handles.append(found)
                answered += 1
        if not answered:
            kind = type(getattr(self.layers[0], "processor", None)).__name__
            raise ConfigError(
                f"foreground: {state.name} has a {kind} in its cross-attention, which cannot be read; give mask"
            )

    def report(self) -> str | None:
        """For ``summary``."""
        said = self.words if isinstance(self.words[0], str) else (f"text tokens {self.words[0]} to {self.words[1]}",)
        return (
            f"foreground: {', '.join(map(str, said))} read from cross-attention in {counted(self._read, 'step')}"
            * (self._read > 0)
            or None
        )

    def of(self, tokens: int, batch: int) -> torch.Tensor | None:
        """(B, tokens) float32 of the run under way, in the model's order of tokens; None: there is none for such a call."""
        state = self._state()
        run = None if state is None else self._runs.get(state.memories.now)
        # Maps of the step under way are not whole.
        if run is None or (state.forward.runs and run.step == state.forward.step):
            return None
        maps = [one for one in run.maps.values() if one.shape[1] == tokens]
        if not maps or batch % len(maps[0]):
            return None
        mean = torch.stack(maps).mean(0)
        return mean.repeat(batch // len(mean), 1)  # of the negative prompt too, whose samples come first

    def _answer(self, number: int) -> Any:
        def answer(stock: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            state = self._state()
            if state is not None and not capturing(query.device) and (run := self._run(state, number)) is not None:
                mask = args[1] if len(args) > 1 else kwargs.get("attn_mask")
                scale = args[4] if len(args) > 4 else kwargs.get("scale")
                self._keep(state, run, number, query, key, mask, scale)
            out: torch.Tensor = stock(query, key, *args, **kwargs)
            return out

        return answer

    def _run(self, state: ForwardState, number: int) -> _Run | None:
        """What the call of a layer is read into; None: it is not read."""
        now, step = state.memories.now, state.forward.step
        if step is None or now.branch:
            return None
        with self._lock:
            run = self._runs.setdefault(now, _Run())
            if run.step > step:  # another run over the same timesteps
                run = self._runs[now] = _Run()
            if state.forward.runs and run.maps and run.step != step:
                return None
            if run.step != step:
                run.step = step
                run.maps.clear()
                self._read += 1
        return run

    def _keep(
        self,
        state: ForwardState,
        run: _Run,
        number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        if holds_both_prompts(state.steps.pipeline()) and len(query) % 2 == 0:  # those of the prompt come last
            half = len(query) // 2
            query, key = query[half:], key[half:]
            mask = mask if mask is None or mask.shape[0] == 1 else mask[half:]
        if not run.words:
            run.words = self._tokens(state)
        last = max(max(words) for words in run.words)
        if last >= key.shape[1]:
            # A call over a picture beside the one over text (Wan's image to video) may have fewer.
            self.short = f"words name text token {last}, and cross-attention is over {key.shape[1]} tokens, from 0 on"
            return
        self.short = None
        run.maps[number] = word_map(query, key, mask, scale, run.words)

    def _tokens(self, state: ForwardState) -> list[list[int]]:
        """The text tokens of each prompt."""
        if not isinstance(self.words[0], str):
            first, last = self.words
            return [list(range(int(first), int(last) + 1))]
        prompts = state.steps.argument("prompt")
        if not isinstance(prompts, str | list | tuple) or not prompts:
            raise ConfigError(
                "foreground: words are looked up in the prompt of the pipeline that runs, and it was given none as text; give "
                "the numbers of text tokens, as in words=(3, 4)"
            )
        tokenizer = getattr(state.steps.pipeline(), "tokenizer", None)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return [word_tokens(tokenizer, prompt, self.words) for prompt in prompts]


def word_map(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float | None, words: list[list[int]]
) -> torch.Tensor:
    """(B, S) float32: attention of each query to the tokens of some words, mean over heads.

    query: (B, S, H, D). key: (B, T, Hk, D). mask: bool or added to scores, as PyTorch broadcasts it to (B, H, S, T). words: text
    tokens of each prompt, of which samples that follow each other share one.
    """
    batch, length, heads, width = query.shape
    scale = width**-0.5 if scale is None else scale
    of_sample = torch.zeros(batch, key.shape[1], device=query.device)
    for sample in range(batch):
        of_sample[sample, words[sample * len(words) // batch]] = 1.0
    if mask is not None:
        mask = mask.expand(batch, heads, *torch.broadcast_shapes(mask.shape[-2:], (1, key.shape[1])))
    total = query.new_zeros((batch, length), dtype=torch.float32)
    at_once = max(1, AT_ONCE // (4 * batch * key.shape[1] * heads))  # queries
    keys = key.repeat_interleave(heads // key.shape[2], 2).float()
    for start in range(0, length, at_once):
        rows = slice(start, start + at_once)
        scores = scale * torch.einsum("bshd,bthd->bhst", query[:, rows].float(), keys)
        if mask is not None:
            own = mask if mask.shape[2] == 1 else mask[:, :, rows]
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own.float()
        share = scores.softmax(-1).nan_to_num(nan=0.0)
        total[:, rows] = torch.einsum("bhst,bt->bs", share, of_sample) / heads
    return total


def word_tokens(tokenizer: Any, prompt: str, words: Sequence[str]) -> list[int]:
    """The tokens of a prompt that some of its words lie in, from 0.

    Raises:
        ConfigError: a prompt without one of them, or a tokenizer that does not say where its tokens are.
    """
    spans = []
    for word in words:
        found = [match.span() for match in re.finditer(rf"\b{re.escape(word)}\b", prompt, re.IGNORECASE)]
        if not found:
            raise ConfigError(
                f"foreground: the prompt {prompt[:200]!r} has no word {word!r}; words are looked up in it"
            )
        spans += found
    try:
        offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    except (NotImplementedError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"foreground: {type(tokenizer).__name__} does not say where in the prompt its tokens are; give their numbers, as in "
            "words=(3, 4)"
        ) from error
    return [
        number for number, (begin, end) in enumerate(offsets) if any(begin < until and end > at for at, until in spans)
    ]


def cross_attention(denoiser: nn.Module) -> list[nn.Module]:
    """The layers of a denoiser that attend to its text alone, beside its self-attention, in order; empty: it has none."""
    family = family_of(denoiser)
    layers = [] if family is None else family.layers(denoiser)
    streams = None if family is None else family.streams.get(type(denoiser).__name__)
    if not layers or (streams is not None and streams.joint):
        return []
    own, found = {id(layer.module) for layer in layers}, {}
    for layer in layers:
        block = denoiser.get_submodule(layer.name.rpartition(".")[0])
        module = getattr(block, "attn2" if streams is None else streams.cross, None)
        if isinstance(module, nn.Module) and id(module) not in own and hasattr(module, "processor"):
            found[id(module)] = module
    return list(found.values())
