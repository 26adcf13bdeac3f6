"""tilewise: training-free attention plugins for diffusers pipelines.

tilewise.patch(pipe, "sta")      replace the attention of a pipeline, in one call
pipe(prompt)
print(tilewise.summary(pipe))    what really ran
tilewise.unpatch(pipe)           as if it had never been patched
"""

from tilewise.plugins.config import Config, load_config, presets, resolve, save_config
from tilewise.plugins.errors import ConfigError, FallbackError, TilewiseError, UnsupportedModelError
from tilewise.plugins.methods.base import Method, methods, register
from tilewise.plugins.methods.dense import Dense
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.models.base import register_family, supported_models
from tilewise.plugins.patching import is_patched, patch, patched, unpatch
from tilewise.plugins.report import explain, summary

__version__ = "0.1.0"

__all__ = [
    "STA",
    "Config",
    "ConfigError",
    "Dense",
    "FallbackError",
    "Method",
    "TilewiseError",
    "UnsupportedModelError",
    "explain",
    "is_patched",
    "load_config",
    "methods",
    "patch",
    "patched",
    "presets",
    "register",
    "register_family",
    "resolve",
    "save_config",
    "summary",
    "supported_models",
    "unpatch",
]
