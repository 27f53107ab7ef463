import os
import sys
from pathlib import Path

COMPILING = dict(os.environ)  # the environment of a process in which Triton compiles its kernels
COMPILING.pop("TRITON_INTERPRET", None)
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder of prepared data that no test changes: 40,000 tokens, a fifth of them for val."""
    import prepare
    folder = tmp_path_factory.mktemp("demo")
    prepare.prepare(prepare.PrepareConfig(dataset="demo", num_tokens=40_000, num_proc=1,
                                          val_fraction=0.2, data_dir=str(folder)))
    return str(folder / "demo")


@pytest.fixture
def small_tiles(monkeypatch):
    """
    Small sizes for the PyTorch path, so that a short sequence has several of each: tiles of 16
    queries, dense blocks of 6 queries, few gathered logits, scores of 7 or 8 keys at a time.
    """
    import tiled
    import tiled_select
    monkeypatch.setattr(tiled, "TILE_QUERIES", 16)
    monkeypatch.setattr(tiled, "DENSE_QUERIES", 6)
    monkeypatch.setattr(tiled, "GATHERED_LOGITS", 1000)
    monkeypatch.setattr(tiled_select, "SCORES", 128)
    monkeypatch.setattr(tiled_select, "SCORE_KEYS", 7)
