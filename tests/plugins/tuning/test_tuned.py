"""What was tuned on a machine: written, read by `patch`, and left alone where it says nothing here."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch

import tilewise
from tilewise.kernels.attention import tuned
from tilewise.kernels.attention.dispatch import choose_backend
from tilewise.kernels.attention.tuned import TunedKernels
from tilewise.plugins.tuning import in_use, record
from tilewise.plugins.tuning.record import Tuned, device_title, file_of, folder, read, remove, versions_here, write

CPU = torch.device("cpu")
STA = tilewise.STA(window=(1, 1, 2), tile=(1, 4, 4))


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """A config folder of this test's own, and nothing tuned before and after it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(in_use, "_WARNED", set())
    yield
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    in_use.load()


def found(**changes) -> Tuned:
    kernels = TunedKernels({("triton", 128, False): (128, 64, 2, 8)}, {(64, True): ("triton", "gluon")})
    record = Tuned(device_title(CPU), "cpu", versions_here(), kernels, {"sta": 10_000}, "2026-11-30T12:00:00", 0.04)
    return dataclasses.replace(record, **changes)


def run(pipe, method, **options):
    tilewise.patch(pipe, method, steps=(0, 1), **options)
    pipe("a fox", height=64, width=64, num_frames=9, num_inference_steps=1, output_type="latent")
    return tilewise.summary(pipe)


def test_what_is_written_is_read():
    file = write(found(rows=[{"ms": 1.5}]), CPU)
    assert file == file_of(CPU) and file.parent == folder() and file.name.startswith("tuned-cpu-")
    assert read(CPU) == found(rows=[{"ms": 1.5}])
    assert [path.name for path in folder().iterdir()] == [file.name]
    assert remove(CPU) == file and remove(CPU) is None and read(CPU) is None


def test_patch_goes_by_it_and_says_so(tiny_pipe):
    write(found(), CPU)
    report = run(tiny_pipe, STA)
    assert {row.kind for row in report.rows} == {"short"}
    assert report.rows[0].reason.endswith("fewer than min_tokens=10000, as tuned here")
    assert any("as tuned on this cpu" in note and "sta from 10,000 tokens" in note for note in report.notes)
    told = tilewise.explain(tiny_pipe, height=64, width=64, frames=9)
    assert "as tuned here" in told.rows[0].backend_reason and told.density == 1.0
    # What is asked for counts more; and so does another method, of which nothing was measured.
    assert "sparse" in {row.kind for row in run(tiny_pipe, STA, min_tokens=0).rows}
    assert "sparse" in {row.kind for row in run(tiny_pipe, "inward").rows}
    remove(CPU)
    assert "sparse" in {row.kind for row in run(tiny_pipe, STA).rows}


def test_dynamic_methods_go_by_it_unless_they_say_themselves(tiny_pipe):
    dynamic = tilewise.Draft(density=0.5, tile=(1, 4, 4))
    assert {row.kind for row in run(tiny_pipe, dynamic).rows} == {"short"}  # a CPU's usual limit
    write(found(least={"draft": 0}), CPU)
    assert "sparse" in {row.kind for row in run(tiny_pipe, dynamic).rows}
    write(found(least={"draft": 10_000}), CPU)
    report = run(tiny_pipe, dynamic)
    assert {row.kind for row in report.rows} == {"short"} and "draft pays from 10000 on" in report.rows[0].reason
    own = dataclasses.replace(dynamic, min_tokens=0)
    assert "sparse" in {row.kind for row in run(tiny_pipe, own).rows}


def test_kernels_are_told(tiny_pipe):
    write(found(), CPU)
    tilewise.patch(tiny_pipe, STA)
    assert tuned.tile("triton", "cpu", 128, False) == (128, 64, 2, 8) and tuned.tile("triton", "cpu", 64, False) is None
    assert tuned.backends(CPU, 64, True) == ("triton", "gluon") and tuned.backends(CPU, 64, False) == ()


def test_a_backend_that_does_not_run_is_passed_over():
    from tilewise.kernels.plans.layout import Grid

    plan = STA.plan(STA.layout(Grid(1, 8, 8)), 2, CPU)
    q = torch.randn(1, 64, 2, 16)
    usual = choose_backend(q, q, q, plan)
    tuned.use({"cpu": ("cpu", TunedKernels({}, {(16, False): ("gluon", "unknown", "torch")}))})
    choice = choose_backend(q, q, q, plan)
    assert choice.backend == usual.backend == "torch"
    assert "the fastest that tilewise tune measured here" in choice.reason and "tune" not in usual.reason


def changed(**changes) -> str:
    return json.dumps({**found().to_dict(), **changes})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (changed(device="NVIDIA H100", chip="sm_90"), r"it is of NVIDIA H100 \(sm_90\), this is cpu"),
        (changed(versions={**versions_here(), "torch": "2.0"}), "it is of other versions .*torch 2.0, here 2"),
        (changed(format=2), "it has format 2, this version reads 1"),
        (changed(min_tokens={"sta": "many"}), "it is not what tilewise tune writes .*'many' is no int"),
        (changed(min_tokens={"sta": True}), "True is no int"),
        (changed(min_tokens={"sta": -1}), "not what tilewise tune writes"),
        (changed(tiles=[{"kernel": "triton", "width": 128, "partial": False, "tile": [1, 2]}]), "not what tilewise"),
        (changed(backends=None), "not what tilewise tune writes"),
        ("[]", "not what tilewise tune writes"),
        ('{"format": 1', "it is not JSON"),
        ("\x00\xff", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        (" " * (1 << 21), "it has 2,097,152 bytes"),
    ],
    ids=lambda value: value if len(value) < 60 else "",
)
def test_a_file_that_says_nothing_here_is_told_once_and_not_used(text, why, tiny_pipe):
    file = file_of(CPU)
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="latin-1" if "\xff" in text else "utf-8")
    with pytest.warns(UserWarning, match=f"is not used: .*{why}"):
        tilewise.patch(tiny_pipe, STA)
    assert in_use.in_use(CPU) is None and in_use.least_tokens("sta", CPU) is None
    assert tuned.backends(CPU, 64, True) == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tilewise.patch(tiny_pipe, STA)
    assert file.read_text("latin-1") is not None  # it is left alone


def test_where_it_is_when_the_variable_is_not_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert folder() == tmp_path / ".config" / "tilewise"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(record.Path, "home", no_home)
    assert not folder().exists() and read(CPU) is None


def test_other_threads_may_look_things_up_while_files_are_read():
    write(found(), CPU)
    in_use.load()
    before = tuned.use({})
    assert tuned.backends(CPU, 64, True) == () and before["cpu"][1] == found().kernels
    found_by_others = before["cpu"]  # what another thread holds is not changed under it
    in_use.load()
    assert before["cpu"] is found_by_others and tuned.backends(CPU, 64, True) == ("triton", "gluon")
