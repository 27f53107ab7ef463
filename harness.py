"""
Benchmarks of EleutherAI's lm-evaluation-harness (lm-eval), asked of our model. Parts of eval.py,
one for each name in --tasks that is not a part of our own.

    python eval.py --out_dir out --tasks=hellaswag,arc_challenge,gsm8k
    python eval.py --out_dir out --tasks=passkey_choice --task_dir=tests/tasks

lm-eval makes the prompts of a task, with few-shot examples, and scores what comes back; adapter.py
answers. Two benchmarks that do not work there have task files here: config/humaneval and
config/infinitebench. --task_dir names a folder with further ones, each a YAML file (format:
docs/task_guide.md in github.com/EleutherAI/lm-evaluation-harness) that may take its rows from a
jsonl file beside it, as those of tests/tasks do.
"""
import difflib
import functools
import logging
import os
import random
import re
import traceback

import numpy as np

import adapter
import sandbox
from configurator import UserError, say

HERE = os.path.dirname(os.path.abspath(__file__))
OURS = [os.path.join(HERE, "config", name) for name in ("humaneval", "infinitebench")]
SEED = 1234  # lm-eval's own, of the examples in the prompts
BOOTSTRAPS = 1000  # resamplings for the standard error of what is no mean
ROWS_SHOWN = 30  # a group of more tasks is shown by its subgroups; eval.json holds them all


class Task:
    """One task, or group of tasks, of the harness: a part of eval.py."""
    SETTINGS = "task_dir num_fewshot limit"

    def __init__(self, name, parts):
        """parts: names of our own parts, which a wrong name may have meant."""
        self.name = name
        self.parts = parts

    def check(self, cfg, subject):
        """Refuse a name that is no task's. Raises UserError."""
        if cfg.task_dir and not os.path.isdir(cfg.task_dir):
            raise UserError(f"task_dir {cfg.task_dir!r} is not a folder")
        need_lm_eval(self.name, self.parts)
        manager = find_tasks(self.name, cfg.task_dir)
        if self.name not in manager.task_index:
            near = difflib.get_close_matches(self.name, {*self.parts, *manager.all_tasks}, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
            if cfg.task_dir and not near:
                hint += f"; no YAML file of {cfg.task_dir} that can be read holds it"
            raise UserError(f"unknown task {self.name!r}: {hint}")

    def measure(self, cfg, subject):
        """
        Returns metrics, {task: {metric: {value, stderr}}}; rows and num_fewshot, {task: number};
        shown, the tasks to print; and what Adapter counts. Raises UserError where there are no
        rows, and for code that may not run.
        """
        manager = find_tasks(self.name, cfg.task_dir)
        folder = functools.partial(own_folder, manager, cfg.task_dir)
        # 1. the rows of the task
        if (manager.task_index[self.name].cfg or {}).get("unsafe_code"):  # before they are fetched
            check_code(self.name, folder(self.name), cfg.run_generated_code)
        loaded = load(self.name, manager, folder(self.name))
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                check_code(task.task_name, folder(task.task_name), cfg.run_generated_code)
            if folder(task.task_name):
                check_columns(task)
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"{task.task_name} shows pictures, which this model cannot read")
            examples = task.get_config("num_fewshot")
            if cfg.num_fewshot >= 0 and examples != 0:  # a task that says 0 makes no use of any
                examples = cfg.num_fewshot
            task.set_config("num_fewshot", examples or 0)
            task.set_fewshot_seed(SEED)
        # 2. the requests and their scores
        asked = adapter.Adapter(subject, self.name)
        found = evaluate(self.name, lm=adapter.for_lm_eval(asked), task_dict=loaded,
                         limit=cfg.limit or None, bootstrap_iters=BOOTSTRAPS, log_samples=False,
                         confirm_run_unsafe_code=cfg.run_generated_code)
        # 3. the result
        metrics = {name: read_metrics(row) for name, row in found["results"].items()}
        shown = [name for name, row in metrics.items() if row]
        if len(shown) > ROWS_SHOWN:
            shown = [name for name in shown if name in found.get("groups", {})]
        return {"metrics": metrics, "shown": shown,
                "rows": {name: n["effective"] for name, n in found["n-samples"].items()},
                "num_fewshot": found["n-shot"], "context": asked.T, **asked.counts}

    def show(self, result):
        rows = sum(result["rows"].values())
        shots = sorted(set(result["num_fewshot"].values()))
        say(f"\n{self.name} ({rows:,} rows, {' or '.join(map(str, shots))} examples in a prompt)")
        for name in result["shown"]:
            for metric, found in result["metrics"][name].items():
                error = "" if found["stderr"] is None else f" ± {digits(found['stderr'])}"
                say(f"  {name:32} {metric:24} {digits(found['value']):>8}{error}")
        if result["truncated"]:
            say(f"  {result['truncated']:,} of {result['requests']:,} prompts did not fit into the "
                f"context of {result['context']} tokens and lost their beginnings "
                "(--block_size reads more)")
        if result["unfinished"]:
            say(f"  {result['unfinished']:,} of {result['answers']:,} answers reached the limit of "
                f"{result['answer_limit']} tokens")

    def summary(self, result):
        """The finite scores of the task itself; of a name for several tasks, those of each."""
        names = [self.name] if result["metrics"].get(self.name) else result["shown"]
        return {f"{name}_{metric}": found["value"]
                for name in names for metric, found in result["metrics"][name].items()
                if found["value"] is not None}


def digits(value):
    """A score as it is shown: five digits, as many as single precision gives to a perplexity."""
    return "-" if value is None else f"{value:.5g}"


# --------------------------------------------------------------------------------------------------
# lm-eval

def need_lm_eval(name, parts):
    """Import lm-eval, and keep it and datasets from printing. Raises UserError without it."""
    try:
        import datasets
        import lm_eval.api.task
    except ImportError:
        near = difflib.get_close_matches(name, parts, 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{name!r} is no part of eval.py ({', '.join(parts)}): {hint}Tasks of "
                        "lm-eval need: pip install lm-eval") from None
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it says, cannot_load does, too
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda rows, **_: rows  # its bar over the making of prompts


def find_tasks(name, task_dir):
    """lm-eval's TaskManager that knows the task: reading its own 14,000 takes ten seconds."""
    folders = [*OURS, os.path.abspath(task_dir)] if task_dir else OURS
    ours = task_manager(tuple(folders), False)
    return ours if name in ours.all_subtasks else task_manager(tuple(folders), True)


@functools.lru_cache
def task_manager(folders, include_defaults):
    from lm_eval.tasks import TaskManager
    return TaskManager(include_path=list(folders), include_defaults=include_defaults)


def own_folder(manager, task_dir, name):
    """
    The folder of a task, group or tag of ours or of the user's: that of its YAML file, of a tag
    that of its first task. None where it is lm-eval's.
    """
    entry = manager.task_index.get(name)
    if entry is None:  # written into the YAML of a group
        return None
    if entry.yaml_path is None:  # a tag
        found = [own_folder(manager, task_dir, task) for task in sorted(entry.tags)]
        return next(filter(None, found), None)
    folders = [*OURS, os.path.abspath(task_dir)] if task_dir else OURS
    path = os.path.abspath(entry.yaml_path)
    ours = any(path.startswith(folder + os.sep) for folder in folders)
    return os.path.dirname(path) if ours else None


def check_code(name, folder, allowed):
    """
    Raise UserError where a task's score may not run the code that the model writes. folder: what
    own_folder returns.
    """
    if not folder:
        raise UserError(f"{name} would run generated code unprotected: only humaneval and tasks "
                        "of --task_dir that use sandbox.pass_at_1 can be measured")
    if not allowed:
        raise UserError(f"{name} runs code that the model writes: allow it with "
                        "--run_generated_code (sandbox.py says how it is kept apart)")
    sandbox.check()


def load(name, manager, folder):
    """What manager.load returns. folder: where paths in the YAML file begin; None = here."""
    before = os.getcwd()
    random.seed(0)  # some tasks shuffle their rows
    np.random.seed(SEED)
    try:
        os.chdir(folder or before)
        return manager.load([name])
    except Exception as e:  # of any type: datasets, or a file of the task itself, raised it
        raise UserError(cannot_load(name, e)) from None
    finally:
        os.chdir(before)


def evaluate(name, **settings):
    """lm_eval's evaluate. What code of the task raises becomes a UserError."""
    from lm_eval.evaluator import evaluate
    try:
        return evaluate(**settings)
    except UserError:
        raise
    except Exception as e:  # of any type
        frames = traceback.extract_tb(e.__traceback__)
        if any(frame.filename == adapter.__file__ for frame in frames):  # our model raised it
            raise
        raise UserError(f"{name} cannot be measured: {type(e).__name__}: {one_line(e)}") from None


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def cannot_load(name, error):
    """One line: why a task's rows cannot be had, and what to do."""
    if type(error).__name__ == "DatasetGenerationError":  # it says why in its cause
        error = error.__cause__ or error
    reason = one_line(error)
    away = re.search("'([^']+)' on the Hub", reason)  # datasets' words
    if away:
        return (f"{name} needs {away[1]} from the hub, which cannot be reached: run it once with "
                "network, which fills datasets' cache (HF_HOME), or copy its YAML into --task_dir "
                "with dataset_path: json and dataset_kwargs: {data_files: {test: FILE.jsonl}}")
    if isinstance(error, StopIteration):  # of datasets, for an empty file
        reason = "there are no rows"
    return f"{name} cannot be loaded: {reason}"


def check_columns(task):
    """
    Raise UserError for a row without a column that a template of the YAML names. In JSON lines,
    datasets fills what one row lacks with None, which the prompt would then hold as a word.
    """
    from jinja2 import Environment, meta
    names = set()
    for template in (task.config.doc_to_text, task.config.doc_to_target, task.config.doc_to_choice):
        if isinstance(template, str):
            used = meta.find_undeclared_variables(Environment().parse(template))
            names |= used or {template} & set(task.eval_docs.column_names)  # or a column's name
    for i, row in enumerate(task.eval_docs, 1):
        missing = sorted(name for name in names if row.get(name) is None)
        if missing:
            raise UserError(f"{task.task_name}: row {i} of its data lacks {', '.join(missing)}")


def read_metrics(row):
    """
    A row of lm-eval's results, {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …}, as
    {"acc": {"value": 0.5, "stderr": 0.1}}. What a filter made of the answers gets its name behind.
    """
    metrics = {}
    for key, value in row.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = row.get(f"{metric}_stderr,{name}")
        label = metric if name == "none" else f"{metric} ({name})"
        metrics[label] = {"value": float(value),
                          "stderr": float(error) if isinstance(error, (int, float)) else None}
    return metrics
