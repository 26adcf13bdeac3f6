"""LoRAs on a pipeline, merged into its weights when it is loaded: W' = W + weight · (α / r) · B A (arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilewise.pipelines.errors import ModelError, SetupError
from tilewise.pipelines.loading.model_folder import check_safetensors
from tilewise.pipelines.media.checksum import file_sha256
from tilewise.plugins.errors import ConfigError, UnsupportedModelError

MERGED = "_tilewise_loras"  # of a pipeline
_SAID = re.compile(
    r"(?P<path>.*?)(?::(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)))?(?:@sha256:(?P<sha256>[0-9a-f]{64}))?", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class LoraChoice:
    """What a request says of a LoRA. weight: what it is scaled by. sha256: of the file when first read; "": not read yet."""

    path: Path
    weight: float = 1.0
    sha256: str = ""

    @classmethod
    def parse(cls, said: Any) -> LoraChoice:
        """From "PATH", "PATH:WEIGHT" or what `str` gives. Raises ConfigError for anything else."""
        found = _SAID.fullmatch(said.strip()) if isinstance(said, str) else None
        if found is None or not found["path"]:
            raise ConfigError(
                f"lora takes PATH or PATH:WEIGHT, style.safetensors:0.8 for instance, not {str(said)[:80]!r}"
            )
        return cls(Path(found["path"]).expanduser(), float(found["weight"] or 1.0), found["sha256"] or "")

    def __str__(self) -> str:
        return f"{self.path}:{self.weight:g}" + (f"@sha256:{self.sha256}" if self.sha256 else "")


def resolve_lora(said: Any) -> str:
    """A LoRA with its file's absolute path and SHA-256.

    Raises:
        ConfigError: for text that names none, or another file than the one that was meant.
        ModelError: for a file that is missing or damaged.
    """
    choice = LoraChoice.parse(said)
    path = choice.path.absolute()
    if not path.is_file():
        raise ModelError(f"there is no LoRA file {choice.path}" + (", it is a folder" if path.is_dir() else ""))
    if path.suffix == ".safetensors":
        check_safetensors(path)
    sha256 = file_sha256(path)
    if choice.sha256 not in ("", sha256):
        raise ConfigError(f"{path} is another file than the LoRA that the clip was made with (SHA-256 {sha256[:12]}…)")
    return str(LoraChoice(path, choice.weight, sha256))


def check_loras(pipe: Any, loras: Sequence[str]) -> None:
    """Whether LoRAs can be merged into a pipeline, which may be without weights.

    Raises:
        UnsupportedModelError: diffusers loads none into this pipeline, or it has two denoisers, which a file does not tell apart.
        SetupError: PEFT, by which diffusers loads them, is not installed.
    """
    if not loras:
        return
    if not callable(getattr(pipe, "load_lora_weights", None)):
        raise UnsupportedModelError(f"{type(pipe).__name__} takes no LoRA")
    if getattr(pipe, "transformer", None) is not None and getattr(pipe, "transformer_2", None) is not None:
        raise UnsupportedModelError(
            f"this {type(pipe).__name__} has two denoisers, and a LoRA file does not say for which one it is: load and fuse it "
            "with diffusers (pipe.load_lora_weights(…, load_into_transformer_2=…))"
        )
    if importlib.util.find_spec("peft") is None:
        raise SetupError("LoRAs need PEFT, by which diffusers loads them: pip install peft")


def merge_loras(pipe: Any, loras: Sequence[str]) -> None:
    """Merges LoRAs into the weights of a pipeline, where it is, and leaves its modules as they were.

    Raises:
        ModelError: for a file that is none, or fits none of the pipeline's parts.
        SetupError, UnsupportedModelError: as `check_loras`.
    """
    check_loras(pipe, loras)
    loras = tuple(map(resolve_lora, loras))
    names = []
    for number, said in enumerate(loras):
        choice = LoraChoice.parse(said)
        names.append(f"lora_{number}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PEFT warns of a second adapter, which is meant
                pipe.load_lora_weights(str(choice.path.parent), weight_name=choice.path.name, adapter_name=names[-1])
        except (ValueError, KeyError, RuntimeError, OSError, TypeError) as error:
            raise ModelError(
                f"{choice.path} is no LoRA for this model: {str(error).strip().splitlines()[0][:300]}"
            ) from error
        if not any(names[-1] in adapters for adapters in pipe.get_list_adapters().values()):
            raise ModelError(
                f"{choice.path} is no LoRA for this model: none of its weights is for {type(pipe).__name__}"
            )
    if not names:
        return
    pipe.set_adapters(names, [LoraChoice.parse(said).weight for said in loras])
    pipe.fuse_lora(components=list(pipe.get_list_adapters()), adapter_names=names)
    pipe.unload_lora_weights()
    setattr(pipe, MERGED, merged_loras(pipe) + loras)


def merged_loras(pipe: Any) -> tuple[str, ...]:
    """What `merge_loras` merged into a pipeline, as `resolve_lora` gives it."""
    return getattr(pipe, MERGED, ())


def require_loras(pipe: Any, loras: Sequence[str]) -> None:
    """Raises ConfigError where settings name other LoRAs than those that are in a pipeline's weights."""
    if tuple(loras) != merged_loras(pipe):
        raise ConfigError(
            f"the settings name the LoRAs {list(loras)}, and those in this pipeline are {list(merged_loras(pipe))}: load "
            "it with load_pipeline(model, loras=settings.lora)"
        )
