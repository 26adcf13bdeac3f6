"""The models that the page was started with: skeletons for plans, and one loaded pipeline."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewise.pipelines.generation.clip_metadata import begin_run
from tilewise.pipelines.generation.preview import LatentPreview
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.model_defaults import ModelDefaults, folder_defaults, model_defaults
from tilewise.pipelines.loading.model_folder import check_folder, find_model
from tilewise.pipelines.loading.revision import model_revision
from tilewise.pipelines.memory.limits import free_memory
from tilewise.pipelines.streaming.preparation import StreamWork, put_weights
from tilewise.plugins.errors import ConfigError
from tilewise.ui.web.common.safety import RefusedError
from tilewise.ui.web.jobs.job import Job

if TYPE_CHECKING:
    from tilewise.ui.web.jobs.shared_clips import SharedClips


class Models:
    """An allow-list of models.

    names: as given at start: "demo", folders, hub ids. device, dtype: as for `load_pipeline`. before_import: called once,
    before diffusers' models are imported for the first skeleton. shared: where several processes make clips together.

    A model whose folder states its defaults has its files checked at once, and its skeleton is made when somebody first asks
    for it: importing diffusers takes longer than all else that the page needs to start. Other models' are made at once.
    Raises ConfigError for an empty or repeating list, and what `load_skeleton` raises for a model that is not there.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: str = "auto",
        dtype: str = "auto",
        before_import: Callable[[], object] = lambda: None,
        shared: SharedClips | None = None,
    ) -> None:
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"--model must name each model of the page once, got {list(names)}")
        self.names = list(names)
        self.device = resolve_device(device)
        self.dtype = str(resolve_dtype(dtype, self.device)).removeprefix("torch.")
        self.shared = shared
        self._lock = threading.Lock()
        self._before_import = before_import
        self._making = threading.Lock()
        self._skeletons: dict[str, Any] = {}
        self._defaults: dict[str, ModelDefaults] = {}
        for name in names:
            stated = folder_defaults(name)
            if stated is not None:
                check_folder(Path(find_model(name)))
            self._defaults[name] = stated or model_defaults(self.skeleton(name))
        self._revisions: dict[str, str] = {}
        self._loaded: tuple[tuple[str, Path | None], Any, LatentPreview | None] | None = None

    def skeleton(self, name: str) -> Any:
        """The pipeline without weights; made by who asks first, while others wait.

        Raises RefusedError for a model that is not on the list, and as `load_skeleton` where it cannot be made.
        """
        self.check_offered(name)
        with self._making:
            if name not in self._skeletons:
                if not self._skeletons:
                    self._before_import()
                self._skeletons[name] = load_skeleton(name)
            return self._skeletons[name]

    def check_offered(self, name: str) -> None:
        """Raises RefusedError for a model that is not on the list."""
        if name not in self.names:
            raise RefusedError(f"this page was not started with the model {name!r}; it has {', '.join(self.names)}")

    def defaults(self, name: str) -> ModelDefaults:
        """The model's own size and settings. Raises RefusedError for a model that is not on the list."""
        self.check_offered(name)
        return self._defaults[name]

    def revision(self, name: str) -> str:
        """As `model_revision`, which reads the weights' checksums, asked once."""
        self.check_offered(name)
        with self._lock:
            if name not in self._revisions:
                self._revisions[name] = model_revision(name)
            return self._revisions[name]

    @property
    def parts(self) -> int:
        """Over how many processes the tokens of a clip are split."""
        return 1 if self.shared is None else self.shared.ranks.parts(self.shared.way)

    def is_loaded(self, name: str, causal: Path | None = None) -> bool:
        return self._loaded is not None and self._loaded[0] == (name, causal)

    def pipeline(self, name: str, work: StreamWork | None = None) -> tuple[Any, LatentPreview | None]:
        """The pipeline on its device, and what makes its live preview, if it can have one.

        work: a stream, whose causal weights are put into it. One model is kept at a time. Only for the thread that does the work.
        """
        self.skeleton(name)
        causal = None if work is None else work.checkpoint
        if self._loaded is None or self._loaded[0] != (name, causal):
            self.unload()
            load = functools.partial(load_pipeline, name, device=str(self.device), dtype=self.dtype)
            pipe = load() if self.shared is None else self.shared.load(load)
            if work is not None:
                put_weights(pipe, work)
            try:
                preview = LatentPreview(pipe)
            except Exception:  # a VAE of another kind: the run is worth more than its preview
                preview = None
            self._loaded = ((name, causal), pipe, preview)
        return self._loaded[1], self._loaded[2]

    def begin_run(self, name: str, job: Job) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and what the metadata of its clips says of the start; the job tells that it is loaded, where it is."""
        return self._begin(name, job, None)

    def begin_stream(self, work: StreamWork, job: Job) -> tuple[Any, dict[str, Any]]:
        """`begin_run` for a stream."""
        return self._begin(work.settings.model, job, work)

    def _begin(self, name: str, job: Job, work: StreamWork | None) -> tuple[Any, dict[str, Any]]:
        loads = not self.is_loaded(name, None if work is None else work.checkpoint)

        def tell(model: str) -> None:
            if loads:
                job.report(f"loading {model}", 0, 1)

        return begin_run(name, self.dtype, lambda: self.pipeline(name, work)[0], tell)

    def unload(self) -> None:
        """Gives the memory of the loaded pipeline back."""
        self._loaded = None
        gc.collect()
        free_memory()
