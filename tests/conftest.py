import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 queries, so that short sequences have several and unions are worth gathering."""
    import kernels
    monkeypatch.setattr(kernels, "TILE", 16)
