"""What the compiler makes of the Triton kernels, for GPUs that need not be here: python kernels.py --report."""
import json
import subprocess
import sys

import pytest

from conftest import COMPILING, ROOT

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use (CUDA programming guide, compute capabilities)


@pytest.fixture(scope="module")
def report():
    code = "import json, kernels; print(json.dumps(list(kernels.compile_report())))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=COMPILING, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_within_each_gpu(report):
    assert len(report) == 2 * 3 * 7
    for r in report:
        spills = {n: c for n, c in r["instructions"].items() if n.startswith(("STL", "LDL"))}
        assert r["stack"] == 0 and not spills, r
        assert r["shared"] <= SHARED[r["sm"]] and 0 < r["registers"] <= 255, r


@pytest.mark.parametrize("sm,unit", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_matrix_units(report, sm, unit):
    """mma.sync on Ampere, wgmma on Hopper, tcgen05 on Blackwell, in the attention both ways, the scores and the loss."""
    found = [r for r in report if r["sm"] == sm and r["kernel"] not in ("select", "sum")]
    assert len(found) == 10 and all(any(n.startswith(unit) for n in r["instructions"]) for r in found)


def test_one_special_function_per_sigmoid(report):
    for r in report:
        if r["kernel"] == "scores":
            special = {n: c for n, c in r["instructions"].items() if n.startswith("MUFU")}
            assert special == {"MUFU.TANH": 16 * 4 * 64 // 128}  # queries × indexer heads × keys / threads
