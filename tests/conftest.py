"""Fixtures every test may use: the shared data folder, one thread, fixed seeds."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# A loaded machine is slow, not wrong: pytest-timeout is what stops a test that hangs.
settings.register_profile("appa", deadline=None)
settings.load_profile("appa")

REPO = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Keep every worker to one thread: the suite runs in several processes on few cores."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the survey data and the tiny language model, which the repository may not contain."""
    folder = Path(os.environ.get("APPA_SHARED", REPO.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}: set APPA_SHARED to the folder that holds data/ and models/")
    return folder


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    """Seed the global generators, for libraries that draw from them behind our back."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy generator is the one third parties use
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
