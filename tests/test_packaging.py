"""Packaging: names import as designed, wheel and sdist install into a clean environment, nothing shadows a library."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_bare_kernels_is_never_our_tree(tmp_path):
    """diffusers looks for a library called ``kernels``; our room of that name must not answer."""
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec is None or spec.origin)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "True"  # not importable at all from elsewhere
    # From the repository root Python sees a folder, which is no package: a real library of the name wins over it …
    library = tmp_path / "site" / "kernels"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("MARK = 'the library'\n")
    out = run(sys.executable, "-c", "import kernels; print(kernels.MARK)", PYTHONPATH=str(library.parent))
    assert out.strip() == "the library"
    # … and without one diffusers does not take the folder for it.
    check = "from diffusers.utils import is_kernels_available; print(is_kernels_available())"
    assert run(sys.executable, "-c", check).strip() == "False"
    assert not list(ROOT.glob("kernels/__init__.py"))


def test_public_names_exist():
    import tilewise

    for name in tilewise.__all__:
        assert getattr(tilewise, name) is not None


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, and a wheel built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    options = ("--no-isolation", "--outdir")
    run(sys.executable, "-m", "build", "--sdist", *options, out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "src", filter="data")
    (unpacked,) = (out / "src").iterdir()
    run(sys.executable, "-m", "build", "--wheel", *options, out / "wheels", cwd=unpacked)
    (wheel,) = (out / "wheels").glob("*.whl")
    return sdist, wheel


def test_wheel_holds_the_rooms_and_the_demo_model(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
    for wanted in (
        "tilewise/kernels/plans/block_plan.py",
        "tilewise/plugins/methods/sta.py",
        "tilewise/plugins/models/wan.py",
        "tilewise/ui/cli/app.py",
        "tilewise/ui/web/look/example-sparse.mp4",
        "tilewise/py.typed",
        "tilewise/pipelines/demo_model/model_index.json",
        "tilewise/pipelines/demo_model/transformer/diffusion_pytorch_model.safetensors",
    ):
        assert wanted in names, wanted
    assert not [name for name in names if name.endswith((".pkl", ".pt", ".bin", ".pyc"))]


def test_wheel_installs_into_a_clean_environment(built, tmp_path):
    """Installed without its dependencies, which are borrowed from this environment: no download in a test."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[1], cwd=tmp_path)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    here = Path(next(p for p in sys.path if p.endswith("site-packages")))
    # A .pth line for everything but the editable install of this tree.
    (site / "borrowed.pth").write_text(f"import sys; sys.path.append({str(here)!r})\n")
    code = "import tilewise, tilewise.kernels.plans.block_plan as p; print(p.__file__); print(tilewise.methods())"
    out = run(python, "-c", code, cwd=tmp_path)
    assert str(tmp_path) in out
    assert "sta" in out
    version = run(tmp_path / "env" / "bin" / "tilewise", "--help", cwd=tmp_path)
    assert "generate" in version
