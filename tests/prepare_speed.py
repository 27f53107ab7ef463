"""
The speed of prepare.py beside its ceiling and beside datasets.map. It is not part of make test.

    python tests/prepare_speed.py --tokenizer=gpt2 --megabytes=512

It writes JSON lines of Python source (the packages of this installation, from the front again where
they end) into a temporary folder, which needs about five times this size or 5 GB, and measures

    1. the ceiling: the tokenizer's encode_to_numpy alone, in as many processes
    2. prepare.py on this text
    3. nanoGPT's way: datasets.map, then all ids into a memmap
    4. the ceiling for bytes: writing the ids of 10^9 bytes, two bytes each, without computing them
    5. prepare.py on 10^9 bytes of such text, with --tokenizer=bytes

Units: s, MB (10^6 bytes) of text per s, MB of memory of all processes together (Linux). 2 to 5
include the start of their processes, 1 does not.
"""
import glob
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import UserError, check_ranges, parse, run
from tokenizer import Tokenizer


@dataclass
class SpeedConfig:
    tokenizer: str = "gpt2"  # of tiktoken: what has encode_to_numpy
    megabytes: int = 512  # of text, for the tokenizer; bytes are measured on 1000
    num_proc: int = 2  # processes

    def __post_init__(self):
        check_ranges(self, {(1, None): "megabytes num_proc"})


# --------------------------------------------------------------------------------------------------
# Input

def python_sources():
    """The text of every Python file of this installation, each different one once."""
    texts = {}
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(glob.glob(folder + "/**/*.py", recursive=True)):
            with open(path, encoding="utf-8", errors="ignore") as f:
                texts.setdefault(f.read())
    return [text for text in texts if text]


def write_text(path, texts, size):
    """Write texts as JSON lines, again and again, until they hold `size` bytes of text."""
    written = 0
    with open(path, "w") as f:
        for text in itertools.cycle(texts):
            f.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= size:
                return


# --------------------------------------------------------------------------------------------------
# What is timed

def encode_part(path, tokenizer, part, n_parts, all_ready):
    """
    Encode every n_parts-th document, and nothing else, from the moment at which all processes are
    ready. Returns (bytes, seconds).
    """
    encoding = Tokenizer(tokenizer).enc
    with open(path) as f:
        texts = [json.loads(line)["text"] for line in itertools.islice(f, part, None, n_parts)]
    all_ready.wait()
    began = time.perf_counter()
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())
    return sum(len(text.encode()) for text in texts), time.perf_counter() - began


def encode_alone(path, cfg):
    """The ceiling: (bytes, seconds) of encode_to_numpy in cfg.num_proc processes."""
    n = cfg.num_proc
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(n, spawn) as pool:
        all_ready = manager.Barrier(n)
        jobs = [pool.submit(encode_part, path, cfg.tokenizer, i, n, all_ready) for i in range(n)]
        sizes, seconds = zip(*(job.result() for job in jobs))
    return sum(sizes), max(seconds)


def resident_mb(pid):
    """Resident memory of a process and its descendants (Linux)."""
    total = 0
    try:
        with open(f"/proc/{pid}/statm") as f:
            total = int(f.read().split()[1]) * resource.getpagesize() / 1e6
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            total += sum(resident_mb(int(child)) for child in f.read().split())
    except OSError:  # it has ended
        pass
    return total


def run_prepare(source, tokenizer, cfg, folder):
    """Run prepare.py. Returns (seconds, peak memory in MB)."""
    os.sync()  # else the input, still on its way to the disk, competes with the output
    command = [sys.executable, str(ROOT / "prepare.py"), f"--dataset={source}",
               f"--tokenizer={tokenizer}", f"--num_proc={cfg.num_proc}", "--name=prepared",
               f"--data_dir={folder}"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_mb(process.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise UserError(process.stderr.read().strip().splitlines()[-1])
    shutil.rmtree(os.path.join(folder, "prepared"))
    return seconds, peak


def datasets_map(source, cfg, folder):
    """nanoGPT's data/openwebtext/prepare.py. Returns seconds."""
    import datasets
    datasets.disable_progress_bars()
    began = time.perf_counter()
    tokenizer = Tokenizer(cfg.tokenizer)

    def encode(row):
        ids = tokenizer.enc.encode_ordinary(row["text"]) + [tokenizer.separator]
        return {"ids": ids, "len": len(ids)}

    data = datasets.load_dataset("json", data_files=source, split="train", cache_dir=folder)
    data = data.map(encode, remove_columns=["text"], num_proc=cfg.num_proc)
    ids = np.memmap(os.path.join(folder, "train.bin"), dtype=tokenizer.dtype, mode="w+",
                    shape=(sum(data["len"]),))
    at = 0
    n_parts = min(1024, len(data))
    for i in range(n_parts):
        part = data.shard(n_parts, i, contiguous=True).with_format("numpy")
        part = np.concatenate(part["ids"])
        ids[at:at + len(part)] = part
        at += len(part)
    ids.flush()
    return time.perf_counter() - began


def write_alone(folder):
    """Seconds to write 2·10^9 bytes to the disk."""
    part = os.urandom(2 * 10**6)
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder) as f:
        for _ in range(1000):
            f.write(part)
        f.flush()
        os.fsync(f.fileno())
        return time.perf_counter() - began


# --------------------------------------------------------------------------------------------------

def begin(what):
    print(f"{what:40}", end="", flush=True)


def end(size, seconds, peak=None):
    """Complete the line. Returns MB/s."""
    speed = size / seconds / 1e6
    memory = f"{peak:8.0f} MB of memory" if peak else ""
    print(f"{seconds:8.1f} s{speed:8.1f} MB/s{memory}", flush=True)
    return speed


def main(argv):
    cfg = SpeedConfig(**parse(SpeedConfig, argv))
    size = cfg.megabytes * 10**6
    texts = python_sources()
    different = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{cfg.megabytes} MB of Python source ({different:.0f} MB of it different), "
          f"{cfg.num_proc} processes, tokenizer {cfg.tokenizer}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "text.jsonl")
        write_text(source, texts, size)
        begin("ceiling: encode_to_numpy alone")
        ceiling = end(*encode_alone(source, cfg))
        begin(f"prepare.py, {cfg.tokenizer}")
        speed = end(size, *run_prepare(source, cfg.tokenizer, cfg, folder))
        begin("datasets.map, then a memmap")
        usual = end(size, datasets_map(source, cfg, folder))
        write_text(source, texts, 10**9)
        os.sync()
        begin("ceiling: writing its ids alone")
        end(10**9, write_alone(folder))
        begin("prepare.py, bytes, 10^9 of them")
        end(10**9, *run_prepare(source, "bytes", cfg, folder))
    print(f"prepare.py reaches {speed / ceiling:.0%} of the ceiling and {speed / usual:.1f} × the "
          "speed of datasets.map")


if __name__ == "__main__":
    run(main)
