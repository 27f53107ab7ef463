"""
What the compiler makes of the Triton kernels: registers, shared memory, instructions, for each GPU.

    python bench.py --compile    # needs no GPU: nothing that is compiled here is run
"""
import collections
import itertools
import os
import re
import subprocess
import tempfile

import kernels
import kernels_loss
import kernels_select
from configurator import UserError

# The layers that the kernels are compiled for: dtype, H, G, d
COMPILED_LAYERS = (("bf16", 16, 4, 128), ("bf16", 12, 4, 64),
                   ("fp32", 16, 4, 128), ("fp32", 16, 4, 256))
COMPILED_INDEXER = dict(Hi=4, DI=64, DIP=64, RI=4)
# dtypes of the kernels' pointers, p_ left out. All others are fp32. "dtype" is the layer's.
POINTERS = {
    "dtype": "q k v o do dq dk_parts dv_parts parts",
    "i32": "indices candidates keys query_bits slots bits_by_key",
    "i64": "pos start offsets k_t",
}


def report_kernels(dtype, H, G, d):
    """The kernels to compile for a layer, by name. What depends on no layer is with the first."""
    found = {"attend": kernels._attend_kernel,
             "attend backward": kernels._attend_backward_kernel,
             "index loss": kernels_loss._index_loss_kernel}
    if dtype == "bf16" or d > 128:
        found["sum"] = kernels._sum_kernel
    if (dtype, H, G, d) == COMPILED_LAYERS[0]:
        found["scores"] = kernels_select._scores_kernel
        found["variance"] = kernels_select._variance_kernel
        found["select"] = kernels_select._select_kernel
        found["pack"] = kernels._pack_kernel
    return found


def compile_report(targets=(80, 89, 90, 100)):
    """
    Compile the kernels ahead of time for GPUs of these compute capabilities, times ten.

    Yields a dict for each: kernel, dtype, sm, H, G, d; registers per thread; bytes of stack (more
    than 0: registers spill) and of shared memory; instructions, a count of each by name. fp32 is
    computed in TF32. sm_80 and sm_89 get the same code, so bf16 is compiled for the one and fp32
    for the other.
    """
    for sm, layer in itertools.product(targets, COMPILED_LAYERS):
        if (sm, layer[0]) in ((80, "fp32"), (89, "bf16")):
            continue
        for name, kernel in report_kernels(*layer).items():
            binary = _compile(name, kernel, sm, *layer)
            dtype, H, G, d = layer
            yield dict(kernel=name, dtype=dtype, sm=sm, H=H, G=G, d=d,
                       shared=binary.metadata.shared, **_resources(binary.asm["cubin"]))


def _compile(name, kernel, sm, dtype, H, G, d):
    """One kernel for one GPU and layer, as kernels.py would launch it. Returns Triton's binary."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    fp32 = dtype == "fp32"
    itemsize = 4 if fp32 else 2

    # 1. what the host code would pass
    heads = H // G
    attention_tile = kernels.queries_per_tile(sm, heads, d * itemsize, fp32=fp32)
    loss_tile = kernels.queries_per_tile(sm, heads, d * itemsize, 4, 4 * 64, fp32=fp32)
    tile = loss_tile if name == "index loss" else attention_tile
    if name == "scores":  # the indexer: 64 wide, fp32
        options = kernels.launch_options(name, sm, 64, itemsize=4)
    else:
        options = kernels.launch_options(name, sm, d, tile * heads, itemsize)
    constants = dict(
        H=H, G=G, D=d, DP=kernels.block_width(d), RP=kernels.triton.next_power_of_2(heads),
        TQ=tile, LIST_TQ=attention_tile, SPLITS=1, DENSE=False, HAS_START=True,
        SIGMOID=True, FAST=True, GRADS=True, PRECISION="tf32", RULE="inverse",
        **COMPILED_INDEXER) | options
    pointers = {"p_" + name: kind for kind, names in POINTERS.items() for name in names.split()}

    # 2. the type of every parameter
    signature, values, attributes = {}, {}, {}
    for parameter in kernel.params:
        name, place = parameter.name, (parameter.num,)
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            values[place] = constants[name]
        elif name.startswith("p_"):
            kind = pointers.get(name, "fp32")
            signature[name] = "*" + (dtype if kind == "dtype" else kind)
            attributes[place] = [["tt.divisibility", 16]]  # tensors begin at multiples of 16 bytes
        elif name in ("scale", "index_scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"

    # 3. compile
    launch = {name: options[name] for name in ("num_warps", "num_stages")}
    source = ASTSource(kernel, signature, values, attributes)
    return kernels.triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch)


def _resources(cubin):
    """Registers, bytes of stack and instructions of a binary, read by NVIDIA's cuobjdump."""
    triton_folder = os.path.dirname(kernels.triton.__file__)
    tool = os.path.join(triton_folder, "backends", "nvidia", "bin", "cuobjdump")

    def dump(flag):
        command = [tool, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dump("--dump-resource-usage")
        assembly = dump("-sass")
    # A line reads: /*0a30*/ @!P0 HGMMA.64x64x16.F32 R24, …
    instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)"
    instructions = re.findall(instruction, assembly, re.MULTILINE)
    return dict(registers=int(re.search(r"REG:(\d+)", usage)[1]),
                stack=int(re.search(r"STACK:(\d+)", usage)[1]),
                instructions=dict(collections.Counter(instructions)))


def print_compile_report():
    """A line for every kernel, layer and GPU."""
    if kernels.triton is None or kernels.INTERPRET:
        raise UserError("--compile needs the package triton, and TRITON_INTERPRET unset")
    print(f"compiled by Triton {kernels.triton.__version__}; nothing here was run")
    print("kernel           dtype    GPU   H    d  registers  stack B  shared KB  "
          "matrix unit      special functions")
    for row in compile_report():
        matrix = [name for name in row["instructions"]
                  if name.startswith(("HGMMA", "UTCHMMA", "HMMA"))]
        matrix = matrix[0] if matrix else ""
        special = [f"{name.removeprefix('MUFU.')} {count}"
                   for name, count in sorted(row["instructions"].items())
                   if name.startswith("MUFU")]
        print(f"{row['kernel']:<16}{row['dtype']:>6}  sm_{row['sm']:<3}{row['H']:>4}{row['d']:>5}"
              f"{row['registers']:>11}{row['stack']:>9}{row['shared'] / 1024:>11.1f}  "
              f"{matrix[:15]:<15}  {', '.join(special)}", flush=True)
