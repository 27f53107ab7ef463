"""
Measure a trained model: perplexity, needle retrieval, statistics of its attention, benchmarks.

    python eval.py --out_dir out
    python eval.py --out_dir out --lengths=1024,4096 --seeds=5 --data=data/other
    python eval.py --out_dir out --tasks=needle,perplexity

Prints tables and writes them to <out_dir>/eval.json, each part as soon as it is done. What is there
already, measured on the same checkpoint with the same settings, is kept: an evaluation that was
interrupted goes on with the part that it had begun. With matplotlib installed it draws two pictures
into out_dir:
    eval.png       needle retrieval, and the curves of the training
    selection.png  where full attention would look and what the indexer selects, for one needle
"""
import functools
import json
import os
import time
from dataclasses import dataclass, field

import numpy as np

import harness
import inspection
import needle
import perplexity
from checkpoint import check_vocabulary, find_data, load_model, read_manifest
from configurator import UserError, check_ranges, parse, replacing, run, say, to_json
from data import Data, check_ids
from device import check_dtype, precision, use_device
from outdir import read_log
from pictures import draw_results, draw_selection, save_picture
from scoring import Batcher
from tokenizer import open_tokenizer

# Each part is a file with
#   SETTINGS               the names of the settings on which its result depends
#   check(cfg, subject)    raises UserError for what cannot be measured, before anything is
#   measure(cfg, subject)  -> its result, a dict for eval.json; raises UserError to be skipped
#   show(result)           prints it
#   summary(result)        -> the few numbers to compare runs by, {name: number}
# Other names are tasks of lm-eval: harness.Task has the same five
PARTS = {
    "perplexity": perplexity,
    "needle": needle,
    "attention": inspection,
}
EVERY_PART = "checkpoint block_size rope_scaling dtype backend"  # settings that matter to each


@dataclass
class EvalConfig:
    out_dir: str = "out"  # folder of the checkpoint; results go there too
    # what to measure, separated by commas: perplexity, needle, attention, tasks of lm-eval (mmlu,
    # gsm8k, infinitebench …). Perplexity always is
    tasks: str = "needle,attention"
    again: bool = False  # measure anew also what eval.json holds already
    data: str = ""  # default: the data it was trained on
    tokenizer: str = ""  # where the checkpoint's vocabulary file lies now; default: where it was
    checkpoint: str = "last"  # last | best (lowest validation loss) | a step
    # context in tokens, which may be longer than in training; 0 = that of training
    block_size: int = 0
    # RoPE for a longer context, see train.py --help; {} = that of training
    rope_scaling: dict = field(default_factory=dict)
    # context lengths in tokens, "256,512"; default: that of the model; for needles also a quarter
    # and half of it
    lengths: str = ""

    # perplexity
    max_tokens: int = 0  # of val.bin; 0 = all
    stride: int = 0  # of the sliding window; 0 = half the context

    # needle retrieval
    depths: int = 5  # positions of the needle, from the start (0) to the end (1)
    seeds: int = 3
    samples: int = 10  # needles per length, depth and seed
    distractors: int = 9  # wrong keys that the right key is ranked among

    # tasks of lm-eval
    task_dir: str = ""  # folder with tasks of your own, YAML and jsonl: see harness.py
    num_fewshot: int = -1  # examples in a prompt; -1 = as the task says
    limit: int = 0  # rows of each task; 0 = all
    run_generated_code: bool = False  # let humaneval run what the model writes, in a sandbox

    # pictures
    plot: bool = True
    compare: str = ""  # out_dir of another run, whose training curves are drawn beside

    # system
    batch_size: int = 0  # sequences per batch; 0 = what fits
    device: str = ""  # default: cuda if there is one, else cpu
    dtype: str = ""  # float32 | bfloat16; default: bfloat16 on cuda
    backend: str = "auto"  # path of the attention: auto | torch | triton | eager

    def __post_init__(self):
        check_dtype(self.dtype)
        check_ranges(self, {(1, None): "depths seeds samples distractors",
                            (0, None): "max_tokens stride block_size batch_size limit",
                            (-1, None): "num_fewshot"})


class Subject:
    """What is measured: a trained model, and what the parts need beside it. Raises UserError."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.device = use_device(cfg.device)
        longer = {"block_size": cfg.block_size, "rope_scaling": cfg.rope_scaling}
        changes = {name: value for name, value in longer.items() if value}
        self.model, self.checkpoint = load_model(cfg.out_dir, self.device, cfg.backend,
                                                 cfg.checkpoint, **changes)
        self.trained = self.checkpoint["config"]  # the settings of the training
        self.T = self.model.config.block_size  # context in tokens
        self.tokenizer = open_tokenizer(self.checkpoint["meta"], cfg.tokenizer)
        self.doc_mask = self.trained.get("doc_mask", True)
        self.batcher = Batcher(cfg.batch_size, self.device)

    @functools.cached_property
    def data(self):
        """The prepared data that cfg.data names; by default what the model was trained on."""
        path = self.cfg.data or find_data(self.checkpoint)
        data = Data(path)
        check_vocabulary(self.checkpoint, data.meta, path)
        check_ids(np.asarray(data.val), data.vocab_size)
        return data

    @property
    def val(self):
        """All ids of the validation text."""
        return np.asarray(self.data.val)

    def lengths(self):
        """cfg.lengths as a list of numbers of tokens; [] where it is not given."""
        try:
            lengths = sorted({int(n) for n in self.cfg.lengths.split(",") if n})
        except ValueError:
            raise UserError(f"lengths {self.cfg.lengths!r} is not a list like 256,512") from None
        if lengths and (max(lengths) > self.T or min(lengths) < 1):
            raise UserError(f"lengths {lengths} must lie in the model's context, 1 to {self.T}: "
                            "--block_size (and --rope_scaling) make it longer")
        return lengths

    def facts(self):
        """Which model this is, for eval.json: what a fair comparison must know of it."""
        config = self.trained
        added = sum(p.numel() for name, p in self.model.named_parameters()
                    if "_gate." in name or ".indexer." in name)
        parameters = sum(p.numel() for p in self.model.parameters())
        step = self.checkpoint["step"]
        facts = {"step": step, "arm": config.get("attention"), "seed": config.get("seed"),
                 "data": config["data"], "vocabulary": self.checkpoint["meta"]["vocabulary"],
                 "parameters": parameters, "gates_and_indexer": added,
                 "config": config}
        if not self.checkpoint["path"].endswith("ckpt.pt"):
            facts["files"] = read_manifest(self.checkpoint["path"])["files"]  # with their checksums
        return facts


def asked_for(tasks):
    """ "needle,mmlu" -> {name: part} of what to measure, perplexity first."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return {name: PARTS.get(name) or harness.Task(name, PARTS) for name in ["perplexity", *names]}


class Results:
    """
    <out_dir>/eval.json: the facts of the model, and the results of the parts with the settings that
    they were measured with. Results of another checkpoint are replaced.
    """

    def __init__(self, cfg, facts):
        self.cfg = cfg
        self.path = os.path.join(cfg.out_dir, "eval.json")
        self.content = {"model": facts, "settings": {}, "seconds": {}, "results": {},
                        "skipped": {}, "summary": {}}
        try:
            with open(self.path, encoding="utf-8") as f:
                old = json.load(f)
            if old["model"] == json.loads(to_json(facts)) and set(old) >= set(self.content):
                self.content = old
        except (OSError, ValueError, KeyError, TypeError):  # none, damaged, of an older version
            pass

    def settings_of(self, part):
        names = f"{EVERY_PART} {part.SETTINGS}".split()
        return json.loads(to_json({name: getattr(self.cfg, name) for name in names}))

    def kept(self, name, part):
        """The result of a part, if it was measured with these settings; else None."""
        if self.cfg.again or self.content["settings"].get(name) != self.settings_of(part):
            return None
        return self.content["results"].get(name)

    def put(self, name, part, result, seconds):
        """Keep the result of a part. Returns it as it will be read again."""
        content = self.content
        result = json.loads(to_json(result))  # keys are strings; what is not finite is None
        content["results"][name] = result
        content["settings"][name] = self.settings_of(part)
        content["seconds"][name] = seconds
        content["skipped"].pop(name, None)
        content["summary"] |= part.summary(result)
        self.write()
        return result

    def skip(self, name, reason):
        self.content["skipped"][name] = reason
        self.write()

    def write(self):
        with replacing(self.path) as f:
            f.write(to_json(self.content, indent=1))


def evaluate(cfg):
    """
    Measure cfg.out_dir's checkpoint. Returns eval.json's content; it is written after each part.
    """
    # 1. what can be refused is refused before anything is measured
    parts = asked_for(cfg.tasks)
    subject = Subject(cfg)
    for part in parts.values():
        part.check(cfg, subject)
    logs = training_logs(cfg)
    results = Results(cfg, subject.facts())
    # 2. the parts
    with precision(subject.device, cfg.dtype):
        for name, part in parts.items():
            result = results.kept(name, part)
            if result is not None:
                say(f"\n{name}: measured before (--again measures it anew)")
            else:
                began = time.time()
                try:
                    result = part.measure(cfg, subject)
                except UserError as e:
                    results.skip(name, str(e))
                    say(f"\n{name} skipped: {e}")
                    continue
                result = results.put(name, part, result, time.time() - began)
            part.show(result)
        # 3. summary and pictures
        say("\nsummary  " + "   ".join(f"{name.replace('_', ' ')} {value:.3f}"
                                       for name, value in results.content["summary"].items()))
        if cfg.plot:
            draw(cfg, subject, results.content["results"], logs)
    return results.content


def training_logs(cfg):
    """{folder: records of its log.jsonl} of the run and of the one to compare it with."""
    folders = [cfg.out_dir]
    if cfg.compare:
        folders.append(cfg.compare)
    logs = {}
    for folder in folders:
        records = read_log(os.path.join(folder, "log.jsonl"))
        logs[folder] = [record for record, _ in records]
    if cfg.compare and not logs[cfg.compare]:
        raise UserError(f"compare: there is no log in {cfg.compare}/log.jsonl")
    return logs


def draw(cfg, subject, results, logs):
    """The pictures of the results, in out_dir."""
    cells = results["needle"]["cells"] if "needle" in results else []
    warmup_end = subject.trained.get("index_warmup_iters", 0) if subject.model.config.sparse else 0
    save_picture(os.path.join(cfg.out_dir, "eval.png"), draw_results, cells, logs, warmup_end)
    try:
        if not cells:
            raise UserError("no needle was measured")
        longest = max(c["length"] for c in cells)
        hay = needle.haystack(subject.val, subject.tokenizer)
        layers, place = inspection.needle_selection(subject.model, hay, subject.tokenizer, longest,
                                                    subject.device)
        save_picture(os.path.join(cfg.out_dir, "selection.png"), draw_selection, layers, place)
    except UserError as e:
        say(f"no selection.png: {e}")


def main(argv):
    evaluate(EvalConfig(**parse(EvalConfig, argv)))


if __name__ == "__main__":
    run(main)
