"""
The safetensors format: named tensors in a file that holds nothing else, so that nothing in it can
be executed.

    save_tensors("model.safetensors", {"embed.weight": w}, {"format": "pt"})
    load_tensors("model.safetensors")["embed.weight"]  # a tensor, read from disk when it is used

A file is  8 bytes: n, the length of the header (an unsigned little-endian integer)
           n bytes of JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …},
               and "__metadata__": {text: text}
           the numbers of all tensors, one tensor behind the other

Source: https://huggingface.co/docs/safetensors. The format is small enough to be written here, so
that a checkpoint needs no further package; the tests compare with that package.
"""
import json
import math
import os

import torch
import xxhash  # comes with datasets

from configurator import UserError
from sharding import whole

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors package


def save_tensors(path, tensors, metadata=None):
    """
    Write {name: tensor} to a new file, and wait until the disk has it.
    metadata: {text: text} for other readers. Raises OSError, on a full disk for example.
    """
    # Wide numbers first: so every tensor begins at a multiple of the size of its numbers
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        x = tensors[name]
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": CODES[x.dtype], "shape": list(x.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            x = tensors[name].detach().cpu().contiguous()
            f.write(x.flatten().view(torch.uint8).numpy())
        f.flush()
        os.fsync(f.fileno())


def load_tensors(path):
    """
    {name: tensor} of a file, in CPU memory. The file is mapped: a tensor is read when it is used.
    Writing to such a tensor does not change the file. Raises UserError for a damaged file.
    """
    try:
        entries, start = _read_header(path)
        size = os.path.getsize(path)
        raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except ValueError as e:
        raise UserError(f"{path} is not a readable safetensors file: {e}") from None
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        part = raw[start + begin:start + end]
        if (start + begin) % dtype.itemsize:  # other writers need not align their tensors
            part = part.clone()
        tensors[name] = part.view(dtype).view(shape)
    return tensors


def _read_header(path):
    """
    ({name: (dtype, shape, begin, end)}, offset of the first number in the file), checked: the
    tensors lie one behind the other and fill the file. Raises ValueError.
    """
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        start = 8 + length
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise ValueError("it is cut off, or of another kind")
        text = f.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError):
        raise ValueError("its header is damaged") from None
    if not isinstance(header, dict):
        raise ValueError("its header is damaged")
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        try:
            dtype = DTYPES[entry["dtype"]]
            shape = entry["shape"]
            begin, end = entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"the entry of {name!r} is damaged, or of a type that is "
                             f"not one of {', '.join(DTYPES)}") from None
        if not all(type(n) is int and 0 <= n <= size for n in numbers):
            raise ValueError(f"the entry of {name!r} is damaged")
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"the shape of {name!r} does not fit its numbers")
        entries[name] = (dtype, shape, begin, end)
    position = 0
    for dtype, shape, begin, end in sorted(entries.values(), key=lambda entry: entry[2:]):
        if begin != position:
            raise ValueError("its tensors overlap, or leave gaps")
        position = end
    if start + position != size:
        raise ValueError(f"it has {size:,} bytes, its header says {start + position:,}")
    return entries, start


def _no_name_twice(pairs):
    """The dict of a JSON object; a name that stands twice in it is refused."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def checksum(path):
    """XXH3 (128 bits, hexadecimal) of a file's content."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while part := f.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Into a model

def load_weights(model, weights, where, may_lack=()):
    """
    Copy {name: tensor} into a model of the same parameters and buffers. may_lack: names that may be
    missing; the model keeps what it has there. where: the weights' origin, for the message.
    Raises UserError, with the differences, where they do not fit or are not finite; the model is
    unchanged then.
    """
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights and name not in may_lack]
    for name, x in weights.items():
        if name not in own:
            wrong.append(f"{name} has no place in it")
        elif not isinstance(x, torch.Tensor):  # a ckpt.pt may hold anything
            wrong.append(f"{name} is no tensor")
        elif x.shape != own[name].shape:
            wrong.append(f"{name} is {tuple(x.shape)}, not {tuple(own[name].shape)}")
    refuse(where, wrong)
    name = not_finite(weights)
    if name:
        raise UserError(f"{where} holds numbers that are not finite ({name}): "
                        "the training that wrote it had failed")
    model.load_state_dict(weights, strict=False)


def refuse(where, wrong):
    """Raise UserError with the first entries of a list of what is wrong, if there is any."""
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{where} does not fit the model: {', '.join(wrong[:3])}{more}")


def not_finite(tensors):
    """The name of the first of {name: tensor} with a NaN or infinity in it, or ""."""
    for name, x in tensors.items():
        if not whole(torch.isfinite(x).all()):
            return name
    return ""
