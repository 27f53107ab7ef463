"""
What the compiler makes of the Triton kernels: python bench.py --compile. Needs no GPU.
"""
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import COMPILING, ROOT

pytestmark = pytest.mark.xdist_group("aot")  # one process compiles for all of them

# Bytes a block may use (CUDA programming guide, compute capabilities). sm_80 has 163 KB, but its
# code also serves sm_86 and sm_89.
SHARED = {80: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


def compiled(sm):
    """bench_compile.compile_report for one compute capability, in a process of its own."""
    code = ("import json, bench_compile; "
            f"print(json.dumps(list(bench_compile.compile_report([{sm}]))))")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=COMPILING, capture_output=True, text=True,
                          timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report():
    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(compiled, (90, 100, 80, 89)) for row in rows]


def test_every_kernel_compiles_within_each_gpu(report):
    assert len(report) == 12 + 7 + 19 + 19
    for r in report:
        spills = {n: c for n, c in r["instructions"].items() if n.startswith(("STL", "LDL"))}
        assert r["stack"] == 0 and not spills, r
        assert r["shared"] <= SHARED[r["sm"]] and 0 < r["registers"] <= 255, r


def test_fp32_compiles_at_the_widest_heads_for_each_gpu(report):
    """TF32 at d = 128 and 256, for attention both ways and the loss."""
    found = [r for r in report if r["dtype"] == "fp32" and r["kernel"] != "sum"]
    kernels = ("attend", "attend backward", "index loss")
    expected = set(itertools.product((89, 90, 100), (128, 256), kernels))
    assert {(r["sm"], r["d"], r["kernel"]) for r in found} == expected
    for r in found:
        assert any("MMA" in n for n in r["instructions"]), r  # the matrix unit is used


@pytest.mark.parametrize("sm,unit", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_matrix_units(report, sm, unit):
    """
    Ampere uses mma.sync, Hopper wgmma, Blackwell tcgen05: in attention, forward and backward, in
    the scores and in the loss.
    """
    found = [r for r in report if r["sm"] == sm and r["dtype"] == "bf16"]
    found = [r for r in found if r["kernel"] not in ("variance", "select", "sum", "pack")]
    assert len(found) == 2 * 3 + 1
    assert all(any(n.startswith(unit) for n in r["instructions"]) for r in found)


def test_one_special_function_per_sigmoid(report):
    for r in report:
        if r["kernel"] == "scores":
            special = {n: c for n, c in r["instructions"].items() if n.startswith("MUFU")}
            # queries × indexer heads × keys / threads
            assert special == {"MUFU.TANH": 16 * 4 * 64 // 128}
