import os
from pathlib import Path

import pytest

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained tiny base in the original layout."""
    return Path(__file__).parents[1] / "examples/tiny/model"
