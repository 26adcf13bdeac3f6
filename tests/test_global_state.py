"""A test that changes what the whole process shares fails, and the tests after it do not see it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import global_state
import pytest
import tiny_wan
import torch
import torch._dynamo.config
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from tilewise.plugins.methods.base import methods, register
from tilewise.plugins.methods.dense import Dense

pytest_plugins = ["pytester"]


def set_backend():
    tiny_wan.tiny_transformer().set_attention_backend("_native_math")


def set_dynamo():
    torch._dynamo.config.recompile_limit += 1


def replace_attention():
    F.scaled_dot_product_attention = lambda *args, **kwargs: None


def add_method():
    register(type("Other", (Dense,), {"name": "other", "__module__": __name__}))


CHANGES = {
    "diffusers' active attention backend": set_backend,
    "F.scaled_dot_product_attention": replace_attention,
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "float32 matmul precision": lambda: torch.set_float32_matmul_precision("high"),
    "TF32 of cuDNN": lambda: setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "flash attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "torch._dynamo.config: recompile_limit": set_dynamo,
    "registered methods: other None": add_method,
    "environment variables: TILEWISE_TEST None → 'left'": lambda: os.environ.update(TILEWISE_TEST="left"),
    "environment variables: PATH": lambda: os.environ.pop("PATH"),
    "working directory": lambda: os.chdir("/"),
    "handler of SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_seen_and_undone(name):
    before = global_state.snapshot()
    CHANGES[name]()
    with pytest.raises(pytest.fail.Exception, match=name):
        global_state.fail_if_changed(before)
    assert global_state.snapshot() == before
    assert "other" not in methods()
    global_state.fail_if_changed(before)


def test_restored_undoes_what_a_library_sets():
    backend = _AttentionBackendRegistry._active_backend
    with global_state.restored():
        set_backend()
        assert _AttentionBackendRegistry._active_backend != backend
    assert _AttentionBackendRegistry._active_backend == backend


def test_fixture_fails_the_test_that_leaves_a_change(pytester):
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(
        """
        import pytest, tiny_wan, torch
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        def test_leaves_a_backend():
            tiny_wan.tiny_transformer().set_attention_backend("_native_math")

        def test_sees_the_default_again():
            assert _AttentionBackendRegistry._active_backend == "native"

        def test_undoes_what_it_sets(monkeypatch):
            monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
            tiny_wan.tiny_transformer().set_attention_backend("_native_math")

        @pytest.fixture(scope="module")
        def double():
            torch.set_default_dtype(torch.float64)

        def test_uses_a_fixture_that_leaves_a_dtype(double):
            assert torch.get_default_dtype() == torch.float64
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--import-mode=importlib")
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines(
        ["*diffusers' active attention backend: *native* → *_native_math*", "*default dtype: *"]
    )
