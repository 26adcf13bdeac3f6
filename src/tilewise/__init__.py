"""tilewise: training-free attention plugins for diffusers pipelines.

tilewise.patch(pipe, "sta")      replace the attention of a pipeline, in one call
pipe(prompt)
print(tilewise.summary(pipe))    what really ran
tilewise.unpatch(pipe)           as if it had never been patched
"""

import pathlib
import re
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

# Names are imported when they are first asked for (PEP 562): they bring in torch, which takes seconds, and neither --help
# nor the version needs it. Type checkers read the imports below; a test holds the two lists together.
if TYPE_CHECKING:
    from tilewise.pipelines.highres.two_stages import highres
    from tilewise.pipelines.streaming.checkpoints.load import load_causal_checkpoint
    from tilewise.pipelines.streaming.explain import explain_stream
    from tilewise.pipelines.streaming.recipe import CausalRecipe
    from tilewise.pipelines.streaming.stream import stream
    from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
    from tilewise.plugins.config import Config, load_config, presets, resolve, save_config
    from tilewise.plugins.context_parallel.enable import enable_context_parallel
    from tilewise.plugins.context_parallel.enable_cfg import enable_cfg_parallel
    from tilewise.plugins.errors import ConfigError, FallbackError, TilewiseError, UnsupportedModelError
    from tilewise.plugins.explain import explain
    from tilewise.plugins.guidance.dual_path import two_paths
    from tilewise.plugins.methods.auto import Auto
    from tilewise.plugins.methods.base import Method, methods, register
    from tilewise.plugins.methods.dense import Dense
    from tilewise.plugins.methods.draft import Draft
    from tilewise.plugins.methods.inward import Inward
    from tilewise.plugins.methods.neighborhood import Neighborhood
    from tilewise.plugins.methods.shifted_windows import ShiftedWindows
    from tilewise.plugins.methods.sta import STA
    from tilewise.plugins.methods.xattention import XAttention
    from tilewise.plugins.models.common.family import Family
    from tilewise.plugins.models.common.registry import register_family, supported_models
    from tilewise.plugins.patching import is_patched, patch, patched, unpatch
    from tilewise.plugins.streaming.kv_cache import KVCache
    from tilewise.plugins.summary import summary
    from tilewise.plugins.watch import watch

__all__ = [
    "STA",
    "Auto",
    "CausalRecipe",
    "Config",
    "ConfigError",
    "Dense",
    "Draft",
    "FallbackError",
    "Family",
    "Inward",
    "KVCache",
    "Method",
    "Neighborhood",
    "ShiftedWindows",
    "TilewiseError",
    "UnsupportedModelError",
    "WindowRecipe",
    "XAttention",
    "enable_cfg_parallel",
    "enable_context_parallel",
    "explain",
    "explain_stream",
    "highres",
    "is_patched",
    "load_causal_checkpoint",
    "load_config",
    "methods",
    "patch",
    "patched",
    "presets",
    "register",
    "register_family",
    "resolve",
    "save_config",
    "stream",
    "summary",
    "supported_models",
    "two_paths",
    "unpatch",
    "watch",
]

_NAMES_BY_MODULE = {
    "config": ("Config", "load_config", "presets", "resolve", "save_config"),
    "context_parallel.enable": ("enable_context_parallel",),
    "context_parallel.enable_cfg": ("enable_cfg_parallel",),
    "errors": ("ConfigError", "FallbackError", "TilewiseError", "UnsupportedModelError"),
    "explain": ("explain",),
    "methods.base": ("Method", "methods", "register"),
    "methods.auto": ("Auto",),
    "methods.dense": ("Dense",),
    "methods.draft": ("Draft",),
    "methods.inward": ("Inward",),
    "methods.neighborhood": ("Neighborhood",),
    "methods.shifted_windows": ("ShiftedWindows",),
    "methods.sta": ("STA",),
    "methods.xattention": ("XAttention",),
    "models.common.family": ("Family",),
    "models.common.registry": ("register_family", "supported_models"),
    "patching": ("is_patched", "patch", "patched", "unpatch"),
    "streaming.kv_cache": ("KVCache",),
    "summary": ("summary",),
    "guidance.dual_path": ("two_paths",),
    "watch": ("watch",),
}
_MODULES = {name: f"tilewise.plugins.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names}
_MODULES["stream"] = "tilewise.pipelines.streaming.stream"
_MODULES["explain_stream"] = "tilewise.pipelines.streaming.explain"
_MODULES["highres"] = "tilewise.pipelines.highres.two_stages"
_MODULES["load_causal_checkpoint"] = "tilewise.pipelines.streaming.checkpoints.load"
_MODULES["CausalRecipe"] = "tilewise.pipelines.streaming.recipe"
_MODULES["WindowRecipe"] = "tilewise.pipelines.streaming.windows.recipe"

try:
    __version__ = metadata.version("tilewise")
except metadata.PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"
    _project = pathlib.Path(__file__).resolve().parents[2] / "pyproject.toml"
    if _project.is_file() and (_line := re.search(r'^version = "(.+)"$', _project.read_text("utf-8"), re.MULTILINE)):
        __version__ = f"{_line[1]}+source"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tilewise' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
