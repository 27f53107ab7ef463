"""weights.py and checkpoint.py: the safetensors format, and checkpoints in any condition."""
import json
import os
import random

import pytest
import safetensors.torch
import torch

from configurator import UserError
from weights import CODES, load_tensors, save_tensors


# ---- the safetensors format

def random_tensors(seed):
    """Tensors of every type, among them scalars, empty ones and transposed ones."""
    rng = random.Random(seed)
    tensors = {}
    for i in range(20):
        shape = [rng.randrange(5) for _ in range(rng.randrange(4))]
        x = (torch.randn(shape) * 50).to(rng.choice(list(CODES)))
        tensors[f"τ.{i}"] = x.mT if x.dim() > 1 else x
    return tensors


def assert_same_tensors(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("seed", range(5))
def test_tensors_go_both_ways_between_this_file_and_the_safetensors_package(tmp_path, seed):
    tensors = random_tensors(seed)
    save_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    assert_same_tensors(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    assert_same_tensors(load_tensors(tmp_path / "ours"), tensors)
    contiguous = {name: x.contiguous() for name, x in tensors.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "theirs")
    assert_same_tensors(load_tensors(tmp_path / "theirs"), tensors)


def test_tensors_that_begin_at_odd_offsets_load(tmp_path):
    header = json.dumps({"a": {"dtype": "BOOL", "shape": [], "data_offsets": [0, 1]},
                         "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}).encode()
    raw = torch.tensor([2.5]).view(torch.uint8).numpy().tobytes()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\1" + raw)
    assert load_tensors(tmp_path / "x")["b"].tolist() == [2.5]


def test_writing_to_a_loaded_tensor_leaves_the_file_as_it_is(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.ones(3)})
    before = (tmp_path / "x").read_bytes()
    load_tensors(tmp_path / "x")["a"].zero_()
    assert (tmp_path / "x").read_bytes() == before


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("header", [
    b"[]", b"{", b"{}", b'{"a": 1}', b'{"a": {}, "a": {}}', b"[" * 100_000,
    {"a": entry(0, 8)},  # one number of four bytes
    {"a": entry(0, 4)},  # four bytes are left over
    {"a": entry(0, 4), "b": entry(0, 4)},  # overlap
    {"a": entry(4, 8)},  # gap
    {"a": entry(0, 8, (2,)), "b": entry(8, 12)},  # beyond the end
    {"a": entry(0, 8, (-1, -2))},
    {"a": entry(0, 8, (10**30,))},
    {"a": entry(0, 8, (True, 2))},
    {"a": entry(0, 8, (2,), "PICKLE")},
    {"a": entry(0, 8, (2,), [])},
])
def test_a_header_that_does_not_fit_the_file_is_refused(tmp_path, header):
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="x is not a readable safetensors file: "):
        load_tensors(tmp_path / "x")


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bool)})
    whole = (tmp_path / "x").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a readable safetensors file"):
            load_tensors(tmp_path / "x")
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(tmp_path / "none")
