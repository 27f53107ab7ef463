"""
Measure a trained model: perplexity, needle retrieval, statistics of its attention, benchmarks.

    python eval.py --out_dir out
    python eval.py --out_dir out --lengths=1024,4096 --seeds=5 --data=data/other,wikitext-103
    python eval.py --out_dir out --tasks=needle,perplexity
    python eval.py --compare out/dense_1 out/dense_2 out/gsa_1 out/gsa_2   # see compare.py

Prints tables and writes them to <out_dir>/eval.json, each part as soon as it is done. What is there
already, measured on the same checkpoint with the same settings, is kept: an evaluation that was
interrupted goes on with the part that it had begun. With matplotlib installed it draws pictures
into out_dir:
    perplexity.png the loss by the number of tokens seen
    eval.png       needle retrieval, and the curves of the training
    attention.png  where attention falls, how open the gates are, what the indexer selects
    selection.png  where full attention would look and what the indexer selects, for one needle
"""
import difflib
import functools
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field

import numpy as np

import inspection
import lambada
import needle
import perplexity
import stability
import texts
from checkpoint import check_vocabulary, find_data, load_model, read_manifest
from compare import compare
from configurator import UserError, check_ranges, parse, replacing, run, say, to_json
from data import Data, check_ids, identity
from device import check_dtype, precision, use_device
from outdir import read_log
from pictures import draw_attention, draw_positions, draw_results, draw_selection, save_picture
from scoring import Batcher
from settings import TrainConfig
from tokenizer import open_tokenizer

# Each part is a file with
#   SETTINGS               the names of the settings on which its result depends
#   check(cfg, subject)    raises UserError for what cannot be measured, before anything is
#   measure(cfg, subject)  -> its result, a dict for eval.json; raises UserError to be skipped
#   show(result)           prints it
#   summary(result)        -> the few numbers to compare runs by, {name: number}
PARTS = {
    "perplexity": perplexity,
    "lambada": lambada,
    "needle": needle,
    "attention": inspection,
    "stability": stability,
}
EVERY_PART = "checkpoint block_size rope_scaling dtype backend"  # settings that matter to each


@dataclass
class EvalConfig:
    out_dir: str = "out"  # folder of the checkpoint; results go there too
    # what to measure, separated by commas: perplexity, needle, attention, stability. Perplexity
    # always is
    tasks: str = "needle,attention,stability"
    again: bool = False  # measure anew also what eval.json holds already
    # texts, separated by commas: prepared folders, presets (prepare.py --list), .txt, .jsonl or
    # .parquet files; default: the data it was trained on. Needles lie in the first one if it is a
    # local file, else in the first folder
    data: str = ""
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
    max_tokens: int = 0  # of each text; 0 = all, of a preset 1,000,000
    stride: int = 0  # of the sliding window; 0 = half the context

    # LAMBADA
    lambada: str = ""  # a local .jsonl or .parquet of its passages; default: from the hub
    limit: int = 0  # rows of each task; 0 = all

    # needle retrieval
    depths: int = 5  # positions of the needle, from the start (0) to the end (1)
    seeds: int = 3
    samples: int = 10  # needles per length, depth and seed
    distractors: int = 9  # wrong keys that the right key is ranked among

    # attention
    attention_windows: int = 10  # of the model's context, spread over val.bin

    # comparison
    # folders of runs that have been evaluated: nothing is measured, they are put side by side
    compare: list = field(default_factory=list)
    unequal: bool = False  # also runs that differ in tokens seen, parameters, data or block size

    # pictures
    plot: bool = True

    # system
    batch_size: int = 0  # sequences per batch; 0 = what fits
    device: str = ""  # default: cuda if there is one, else cpu
    dtype: str = ""  # float32 | bfloat16; default: bfloat16 on cuda
    backend: str = "auto"  # path of the attention: auto | torch | triton | eager

    def __post_init__(self):
        check_dtype(self.dtype)
        check_ranges(self, {(1, None): "depths seeds samples distractors attention_windows",
                            (0, None): "max_tokens stride limit block_size batch_size"})


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
        self.texts = {}  # by name, see text()

    @functools.cached_property
    def data(self):
        """The first prepared folder of cfg.data; by default what the model was trained on."""
        names = [name for name in texts.text_names(self.cfg.data)
                 if texts.kind_of_text(name) == "folder"]
        return self.folder(names[0] if names else find_data(self.checkpoint))

    def folder(self, path):
        """The Data of a prepared folder. Raises UserError if the model cannot read it."""
        data = Data(path)
        check_vocabulary(self.checkpoint, data.meta, path)
        check_ids(np.asarray(data.val), data.vocab_size)
        return data

    def text(self, name):
        """The ids of a text that cfg.data names, see texts.py. Raises UserError."""
        if name not in self.texts:
            if texts.kind_of_text(name) == "folder":
                ids = np.asarray(self.folder(name).val)
            else:
                ids = texts.encode_text(name, self.tokenizer, self.cfg.max_tokens)
            self.texts[name] = ids
        return self.texts[name]

    @property
    def val(self):
        """Ids to hide needles in: of the local file that cfg.data names first, else of data."""
        first = texts.text_names(self.cfg.data)[:1]
        if first and texts.kind_of_text(first[0]) == "files":
            return self.text(first[0])
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
        config = asdict(TrainConfig()) | self.trained  # what an older version lacks: its default
        meta = self.checkpoint["meta"]
        checksum = hashlib.sha256(to_json(identity(meta), sort_keys=True).encode()).hexdigest()
        added = sum(p.numel() for name, p in self.model.named_parameters()
                    if "_gate." in name or ".indexer." in name)
        parameters = sum(p.numel() for p in self.model.parameters())
        step = self.checkpoint["step"]
        facts = {"step": step, "arm": config.get("attention"), "seed": config.get("seed"),
                 "tokens_seen": step * (config["batch_size"] * config["grad_accum"]
                                        * config["block_size"]),
                 "data": config["data"], "data_checksum": checksum,
                 "vocabulary": meta["vocabulary"],
                 "parameters": parameters, "gates_and_indexer": added,
                 "config": config}
        if not self.checkpoint["path"].endswith("ckpt.pt"):
            facts["files"] = read_manifest(self.checkpoint["path"])["files"]  # with their checksums
        return facts


def asked_for(tasks):
    """ "needle,attention" -> the names of the parts to measure, perplexity first."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            near = difflib.get_close_matches(name, PARTS, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(PARTS)}"
            raise UserError(f"unknown task {name!r}: {hint}")
    return list(dict.fromkeys(["perplexity", *names]))


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
        content["summary"] = {}  # not |=: with other settings a part may have other numbers
        for kept, old in content["results"].items():
            content["summary"] |= PARTS[kept].summary(old)
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
    names = asked_for(cfg.tasks)
    subject = Subject(cfg)
    parts = {name: PARTS[name] for name in names}
    for part in parts.values():
        part.check(cfg, subject)
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
            draw(cfg, subject, results.content["results"])
    return results.content


def draw(cfg, subject, results):
    """The pictures of the results, in out_dir."""
    records = [record for record, _ in read_log(os.path.join(cfg.out_dir, "log.jsonl"))]
    if "perplexity" in results:
        save_picture(os.path.join(cfg.out_dir, "perplexity.png"), draw_positions,
                     perplexity.curves(results["perplexity"]))
    cells = results["needle"]["cells"] if "needle" in results else []
    warmup_end = subject.trained.get("index_warmup_iters", 0) if subject.model.config.sparse else 0
    save_picture(os.path.join(cfg.out_dir, "eval.png"), draw_results, cells, records, warmup_end)
    if "attention" in results:
        save_picture(os.path.join(cfg.out_dir, "attention.png"), draw_attention,
                     results["attention"])
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
    cfg = EvalConfig(**parse(EvalConfig, argv))
    if cfg.compare:
        compare(cfg.compare, PARTS, cfg.unequal, cfg.plot)
    else:
        evaluate(cfg)


if __name__ == "__main__":
    run(main)
