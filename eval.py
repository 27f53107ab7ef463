"""
Measure a trained model: perplexity, needles, RULER, what its attention does, benchmarks.

    python eval.py --out_dir out
    python eval.py --out_dir out --data=data/demo,wikitext-103,notes.txt --lengths=256,512
    python eval.py --out_dir out --tasks=needle,ruler --block_size=2048 --lengths=512,1024,2048
    python eval.py --out_dir out --tasks=lambada,mmlu,hellaswag,gsm8k          # see harness.py
    python eval.py --compare out/dense_1 out/dense_2 out/gsa_1 out/gsa_2       # see compare.py

Prints tables and writes them to <out_dir>/eval.json, each part as soon as it is done. What is there
already, measured on the same checkpoint with the same settings, is kept: an evaluation that was
interrupted begins again with the part that it was at. There is one result for each part: one with
other settings, or of another checkpoint, replaces it. A change of the code is not noticed: --again
measures anew. With matplotlib installed it draws pictures of what was asked for into out_dir:
    eval.png        needle retrieval, and the curves of the training
    perplexity.png  the loss by the number of tokens seen
    ruler.png       RULER's tasks at each length
    attention.png   where attention falls, how open the gates are, what the indexer selects
    selection.png   where full attention would look and what the indexer selects, for one needle
"""
import contextlib
import os
import time
from dataclasses import dataclass, field

import harness
import inspection
import lambada
import needle
import perplexity
import pictures
import ruler
import stability
from compare import compare
from configurator import UserError, check_ranges, listed, parse, run, say
from device import check_dtype, precision
from outdir import read_log
from eval_results import Results
from subject import Subject

# Each part is a file, or an object, with
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
    **{name: ruler.Task(name) for name in ruler.TASKS},
}
DEFAULT = "needle,attention,stability"


def find_part(name):
    """The part of a name; a name that is none of ours is a task of lm-eval."""
    return PARTS.get(name) or harness.Task(name, [*PARTS, "ruler"])


@dataclass
class EvalConfig:
    out_dir: str = "out"  # folder of the checkpoint; results go there too
    # what to measure, separated by commas: perplexity (always measured), needle, attention,
    # stability, lambada, ruler or some of its tasks (niah_single_1, vt …), and tasks of lm-eval
    # (mmlu, gsm8k, infinitebench …); default: needle,attention,stability
    tasks: str = ""
    again: bool = False  # measure anew also what eval.json holds already
    tokenizer: str = ""  # where the checkpoint's vocabulary file lies now; default: where it was
    checkpoint: str = "last"  # last | best (lowest validation loss) | a step
    # context in tokens, which may be longer than in training; 0 = that of training
    block_size: int = 0
    # RoPE for a longer context, see train.py --help; {} = that of training
    rope_scaling: dict = field(default_factory=dict)
    # how many keys are selected, "{'k_rule': 'fixed', 'k_base': 48}"; what is not named is as in
    # training: k_rule, k_base, k_min, k_max, n_sink, n_local
    budget: dict = field(default_factory=dict)
    # context lengths in tokens, "256,512"; default: that of the model; for needles also a quarter
    # and half of it
    lengths: str = ""

    # perplexity
    # texts, separated by commas: prepared folders, presets (prepare.py --list), .txt, .jsonl or
    # .parquet files; default: the data it was trained on
    data: str = ""
    max_tokens: int = 1_000_000  # the first so many of each text; 0 = all
    stride: int = 0  # of the sliding window; 0 = half the context

    # needles and RULER
    seeds: int = 3
    # needles per length, depth and seed; of RULER, samples per task, length and seed
    samples: int = 10
    # what the facts are hidden in: a text file or a prepared folder (RULER's own is
    # PaulGrahamEssays.json); default: the validation text
    haystack: str = ""
    needles: str = "single"  # kinds: single,multikey,multivalue,multiquery
    depths: int = 5  # positions of the needle, from the start (0) to the end (1)
    distractors: int = 9  # wrong keys that the right key is ranked among
    squad: str = ""  # SQuAD's dev-v2.0.json, for RULER's qa_1
    hotpotqa: str = ""  # HotpotQA's hotpot_dev_distractor_v1.json, for RULER's qa_2

    # attention
    attention_windows: int = 10  # of the model's context, spread over the validation text

    # LAMBADA and tasks of lm-eval
    limit: int = 0  # rows of each task; 0 = all
    lambada: str = ""  # a local .jsonl or .parquet of its passages; default: from the hub
    task_dir: str = ""  # folder with tasks of your own, YAML and jsonl: see harness.py
    num_fewshot: int = -1  # examples in a prompt; -1 = as the task says
    run_generated_code: bool = False  # let humaneval run what the model writes, in a sandbox

    # comparison
    # folders of runs that have been evaluated: nothing is measured, they are put side by side
    compare: list = field(default_factory=list)
    unequal: bool = False  # also runs that differ in tokens seen, parameters, data or block size

    # system
    plot: bool = True  # draw pictures
    batch_size: int = 0  # sequences per batch; 0 = what fits
    device: str = ""  # default: cuda if there is one, else cpu
    dtype: str = ""  # float32 | bfloat16; default: bfloat16 on cuda
    backend: str = "auto"  # path of the attention: auto | torch | triton | eager

    def __post_init__(self):
        check_dtype(self.dtype)
        check_ranges(self, {(1, None): "depths seeds samples distractors attention_windows",
                            (0, None): "max_tokens stride block_size batch_size limit",
                            (-1, None): "num_fewshot"})


def asked_for(tasks):
    """ "needle,ruler,mmlu" -> {name: part} of what to measure, perplexity first."""
    names = ["perplexity"]
    for name in listed(tasks or DEFAULT):
        names += ruler.TASKS if name == "ruler" else [name]
    return {name: find_part(name) for name in names}


def check(parts, cfg, subject):
    """
    Refuse what cannot be measured before anything is. Raises UserError. Perplexity, where it is
    not required, is left to be skipped.
    """
    for name, part in parts.items():
        try:
            part.check(cfg, subject)
        except UserError:
            if name != "perplexity" or name in required(cfg):
                raise


def required(cfg):
    """
    The parts without which an evaluation has failed: those of --tasks, and perplexity where there
    are none, or where the user has set its text or its stride.
    """
    names = listed(cfg.tasks)
    if not names or cfg.data or cfg.stride:
        names.append("perplexity")
    return names


def evaluate(cfg):
    """
    Measure cfg.out_dir's checkpoint. Returns eval.json's content; it is written after each part.
    Raises UserError, at the end if a part that is required has been skipped.
    """
    parts = asked_for(cfg.tasks)
    subject = Subject(cfg)
    check(parts, cfg, subject)
    results = Results(cfg, subject, find_part)
    measured = {}  # part -> result
    with precision(subject.device, cfg.dtype):
        # 1. the parts
        for name, part in parts.items():
            began = time.time()
            try:
                result = results.kept(name, part)
                if result is None:
                    found = part.measure(cfg, subject)
                    result = results.put(name, part, found, time.time() - began)
                else:
                    say(f"\n{name}: measured before (--again measures it anew)")
            except UserError as e:
                say(f"\n{name} skipped: {e}")
                results.skip(name, str(e))
            else:
                part.show(result)
                measured[name] = result
        ruler.show_averages(measured)
        # 2. summary and pictures
        say("\nsummary")
        for name in measured:
            for label, value in results.summary_of(name).items():
                say(f"  {label.replace('_', ' '):48}{value:10.5g}")
        say(f"\nall of it: {results.path}")
        if cfg.plot:
            draw(cfg, subject, measured)
    missed = [name for name in parts if name in required(cfg) and name not in measured]
    if missed:
        raise UserError(f"not measured, for the reasons above: {', '.join(missed)}")
    return results.content


def draw(cfg, subject, measured):
    """The pictures of the results, in out_dir. measured: {part: result}."""
    def save(name, *args):
        pictures.save_picture(os.path.join(cfg.out_dir, name), *args)
    if "perplexity" in measured:
        save("perplexity.png", pictures.draw_positions, perplexity.curves(measured["perplexity"]))
    if "attention" in measured:
        save("attention.png", pictures.draw_attention, measured["attention"])
    if cells := ruler.all_cells(measured):
        save("ruler.png", pictures.draw_ruler, cells)
    if "needle" not in measured:
        return
    found = measured["needle"]
    records = [record for record, _ in read_log(os.path.join(cfg.out_dir, "log.jsonl"))]
    warmup_end = subject.trained.get("index_warmup_iters", 0) if subject.model.config.sparse else 0
    save("eval.png", pictures.draw_results, found["cells"], records, warmup_end)
    try:
        layers, place = inspection.needle_selection(subject, found)
    except UserError as e:
        say(f"no selection.png: {e}")
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(cfg.out_dir, "selection.png"))  # it showed another needle
    else:
        save("selection.png", pictures.draw_selection, layers, place)


def main(argv):
    cfg = EvalConfig(**parse(EvalConfig, argv))
    if cfg.compare:
        compare(cfg.compare, find_part, cfg.unequal, cfg.plot)
    else:
        evaluate(cfg)


if __name__ == "__main__":
    run(main)
