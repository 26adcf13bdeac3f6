"""docs/models.md is what the code says, and every model on it has a test file."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from examples.list_models import page  # noqa: E402
from tilewise.plugins.models.common.registry import supported_models  # noqa: E402


def test_the_page_is_up_to_date():
    written = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert written == page(), "python -m examples.list_models > docs/models.md"


def test_every_denoiser_is_tested():
    tests = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)
    )
    for classes in supported_models().values():
        for name in classes:
            assert name in tests, f"no test builds a {name}"
