"""
Benchmarks of EleutherAI's lm-evaluation-harness (lm-eval), asked of our model. Parts of eval.py,
one for each name in --tasks that is not a part of our own.

    python eval.py --out_dir out --tasks=hellaswag,arc_challenge,gsm8k
    python eval.py --out_dir out --tasks=passkey_choice --task_dir=tests/tasks

lm-eval makes the prompts of a task, with few-shot examples, and scores what comes back. Adapter
answers its three kinds of requests: the log-likelihood of a continuation, that of a whole text, and
a text to generate. Tasks that need other code lie in config/humaneval and config/infinitebench;
--task_dir names a folder with further ones, each a YAML file (format: docs/task_guide.md in
github.com/EleutherAI/lm-evaluation-harness), which may take its rows from a jsonl file beside it.
"""
import difflib
import functools
import logging
import os

import numpy as np
import torch

import sandbox
from configurator import UserError, say
from sample import draw_token
from scoring import Progress, Score, answer, greedy_token, score

HERE = os.path.dirname(os.path.abspath(__file__))
OURS = [os.path.join(HERE, "config", name) for name in ("humaneval", "infinitebench")]
BOOTSTRAPS = 1000  # resamplings for the standard error of what is no mean
ANSWER_TOKENS = 256  # the limit where a task names none, as in lm-eval
ROWS_SHOWN = 30  # a group of more tasks is shown by its subgroups; eval.json holds them all


class Task:
    """One task, or group of tasks, of the harness: a part of eval.py."""
    SETTINGS = "task_dir num_fewshot limit"

    def __init__(self, name, parts):
        """parts: names of our own parts, which a wrong name may have meant."""
        self.name = name
        self.parts = parts

    def check(self, cfg, subject):
        """Refuse what is no task or may not run. Raises UserError."""
        # 1. the name
        if cfg.task_dir and not os.path.isdir(cfg.task_dir):
            raise UserError(f"task_dir {cfg.task_dir!r} is not a folder")
        need_lm_eval(self.name, self.parts)
        manager = find_tasks(self.name, cfg.task_dir)
        if self.name not in manager.task_index:
            near = difflib.get_close_matches(self.name, [*self.parts, *manager.all_tasks], 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
            raise UserError(f"unknown task {self.name!r}: {hint}")
        # 2. whether it runs code
        entry = manager.task_index[self.name]
        if not (entry.cfg or {}).get("unsafe_code"):
            return
        if not is_ours(entry, cfg.task_dir):
            raise UserError(f"{self.name} would run generated code unprotected: only humaneval "
                            "and tasks of --task_dir that use sandbox.pass_at_1 can be measured")
        if not cfg.run_generated_code:
            raise UserError(f"{self.name} runs code that the model writes: allow it with "
                            "--run_generated_code (sandbox.py says how it is kept apart)")
        sandbox.check()

    def measure(self, cfg, subject):
        """
        Returns metrics, {task: {metric: {value, stderr}}}; rows and num_fewshot, {task: number};
        shown, the tasks to print; and what Adapter counts. Raises UserError without the rows.
        """
        from lm_eval.evaluator import simple_evaluate
        manager = find_tasks(self.name, cfg.task_dir)
        entry = manager.task_index[self.name]
        # 1. the rows of the task
        loaded = load(self.name, manager, is_ours(entry, cfg.task_dir))
        top = list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())
        # 2. the requests and their scores
        adapter = Adapter(subject, self.name)
        found = simple_evaluate(
            model=for_lm_eval(adapter), tasks=top, task_manager=manager, log_samples=False,
            num_fewshot=None if cfg.num_fewshot < 0 else cfg.num_fewshot,
            limit=cfg.limit or None, bootstrap_iters=BOOTSTRAPS,
            confirm_run_unsafe_code=cfg.run_generated_code and is_ours(entry, cfg.task_dir))
        # 3. the result
        metrics = {name: read_metrics(row) for name, row in found["results"].items()}
        shown = [name for name, row in metrics.items() if row]
        if len(shown) > ROWS_SHOWN:
            shown = [name for name in shown if name in found.get("groups", {})]
        return {"metrics": metrics, "shown": shown,
                "rows": {name: n["effective"] for name, n in found["n-samples"].items()},
                "num_fewshot": found["n-shot"], "context": adapter.T, **adapter.counts}

    def show(self, result):
        rows = sum(result["rows"].values())
        shots = sorted({n for n in result["num_fewshot"].values() if n is not None})
        say(f"\n{self.name} ({rows:,} rows, {' or '.join(map(str, shots or [0]))} examples each)")
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
        """The scores of the task itself; of a name for several tasks, those of each."""
        names = [self.name] if result["metrics"].get(self.name) else result["shown"]
        return {f"{name}_{metric}": found["value"]
                for name in names for metric, found in result["metrics"][name].items()}


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


def is_ours(entry, task_dir):
    """Does a task come from a folder of ours or of the user's, not from lm-eval itself?"""
    folders = [*OURS, os.path.abspath(task_dir)] if task_dir else OURS
    path = os.path.abspath(str(entry.yaml_path))
    return any(path.startswith(folder + os.sep) for folder in folders)


def load(name, manager, ours):
    """What manager.load returns. Paths in a task of ours begin in the folder of its YAML file."""
    entry = manager.task_index[name]
    before = os.getcwd()
    try:
        if ours:
            os.chdir(os.path.dirname(entry.yaml_path))
        loaded = manager.load([name])
    except Exception as e:  # of any type: datasets, or a file of the task itself, raised it
        raise UserError(cannot_load(name, entry, e)) from None
    finally:
        os.chdir(before)
    if ours:
        for task in loaded["tasks"].values():
            check_columns(task)
    return loaded


def cannot_load(name, entry, error):
    """One line: why a task's rows cannot be had, and what to do."""
    reason = " ".join(str(error).split()) or type(error).__name__
    config = entry.cfg or {}
    if isinstance(error, ConnectionError) or "the Hub" in reason:
        source = config.get("dataset_path", "its dataset")
        return (f"{name} needs {source} from the hub, which cannot be reached: run it once with "
                "network, which fills datasets' cache (HF_HOME), or copy its YAML into --task_dir "
                "with dataset_path: json and dataset_kwargs: {data_files: {test: FILE.jsonl}}")
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
            raise UserError(f"{task.task_name}: row {i} of its data has no {' and no '.join(missing)}")


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


def for_lm_eval(adapter):
    """The adapter as the type that lm-eval asks for."""
    from lm_eval.api.model import LM

    class Model(LM):
        loglikelihood = staticmethod(adapter.loglikelihood)
        loglikelihood_rolling = staticmethod(adapter.loglikelihood_rolling)
        generate_until = staticmethod(adapter.generate_until)
    return Model()


# --------------------------------------------------------------------------------------------------
# The model

class Adapter:
    """
    lm-eval's requests, answered by our model. A request's args hold texts.

    Every context begins with the separator, as a document of the training does: what a BOS is to
    other models. A context that is too long loses its beginning, the separator first, as in
    lm-eval's own models.
    """

    def __init__(self, subject, name=""):
        self.model = subject.model
        self.tokenizer = subject.tokenizer
        self.batcher = subject.batcher
        self.T = subject.T
        self.name = name
        # prompts, those of them that were too long; texts written, those that reached the limit,
        # the highest limit in tokens
        self.counts = {"requests": 0, "truncated": 0, "answers": 0, "unfinished": 0,
                       "answer_limit": 0}

    def encode(self, text):
        """A text as a document: the separator and its ids."""
        return np.append(self.tokenizer.separator, self.tokenizer.encode(text)).astype(np.int64)

    def encode_pair(self, context, continuation):
        """
        Ids of both. As in lm-eval, blanks between them belong to the continuation (many a token
        begins with one), and the two are encoded as one text.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped):] + continuation
        first = self.encode(stripped)
        return first, self.encode(stripped + continuation)[len(first):]

    def fit(self, ids, answer_tokens):
        """The ids of a context, without its beginning where the answer would have no room."""
        room = self.T - answer_tokens
        if room < 1:
            raise UserError(f"{self.name}: an answer to be scored has {answer_tokens + 1} tokens, "
                            f"the context {self.T}: --block_size makes it longer")
        self.counts["requests"] += 1
        self.counts["truncated"] += len(ids) > room
        return ids[-room:]

    def loglikelihood(self, requests):
        """args: (context, continuation). Returns (log-likelihood, would it be generated?) each."""
        pairs = []
        for request in requests:
            context, continuation = self.encode_pair(*request.args)
            # the last token of the continuation is never read
            pairs.append((self.fit(context, len(continuation) - 1), continuation))
        scores = self.score_pairs(pairs, "answers")
        return [(found.likelihood, found.greedy) for found in scores]

    def loglikelihood_rolling(self, requests):
        """
        args: (text,). Returns the log-likelihood of each text: windows of T tokens one behind the
        other, the first of which begins with the separator, and the last as early as it can.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        pairs, owners = [], []
        for i, request in enumerate(requests):
            separator, *ids = self.encode(request.args[0]).tolist()
            for window in get_rolling_token_windows(ids, separator, self.T, 1):
                pairs.append(tuple(map(np.array, make_disjoint_window(window))))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, found in zip(owners, self.score_pairs(pairs, "windows")):
            totals[i] += found.likelihood
        return totals

    def score_pairs(self, pairs, what):
        """A Score for each (context, continuation), n pairs of ids. Each context is read once."""
        # 1. the continuations of each context
        members = {}
        for i, (context, continuation) in enumerate(pairs):
            if len(continuation):  # an empty one is certain
                members.setdefault(context.tobytes(), []).append(i)
        rows = list(members.values())
        # 2. their scores
        with Progress(f"{self.name}, {what}", len(rows)) as progress:
            found = score(self.model, [pairs[row[0]][0] for row in rows],
                          [[pairs[i][1] for i in row] for row in rows], self.batcher, progress)
        # 3. in the order of the pairs
        scores = [Score(0.0, True)] * len(pairs)
        for row, row_scores in zip(rows, found):
            for i, one in zip(row, row_scores):
                scores[i] = one
        return scores

    def generate_until(self, requests):
        """args: (context, generation settings). Returns a text each, without what stopped it."""
        texts = [""] * len(requests)
        # 1. requests that draw alike can share a batch
        kinds = {}
        for i, request in enumerate(requests):
            context, settings = request.args
            limit, stops, how = read_generation(self.name, settings)
            limit = min(limit, self.T // 2)  # an answer leaves half the context to its prompt
            prompt = self.fit(self.encode(context), limit)
            kinds.setdefault(how, []).append((i, prompt, limit, stops))
        # 2. the answers
        with Progress(f"{self.name}, texts", len(requests)) as progress:
            for how, items in kinds.items():
                numbers, prompts, limits, stops = zip(*items)
                found = answer(self.model, prompts, limits, stops, self.tokenizer, self.batcher,
                               progress, drawing(how, self.model))
                for i, one in zip(numbers, found):
                    texts[i] = one.text
                    self.counts["unfinished"] += not one.stopped
                self.counts["answers"] += len(items)
                self.counts["answer_limit"] = max(self.counts["answer_limit"], *limits)
        return texts


def read_generation(name, settings):
    """
    A task's generation settings -> the most tokens of an answer, the strings that end it, and
    how to draw tokens: None, the likeliest, or (temperature, top_k, top_p). Raises UserError.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    stops = given.pop("until", [])
    stops = [stops] if isinstance(stops, str) else stops
    limit = ANSWER_TOKENS
    for key in ("max_completion_tokens", "max_tokens", "max_new_tokens", "max_gen_toks"):
        limit = int(given.pop(key, limit))  # in lm-eval, too, the last of these names counts
    temperature = float(given.pop("temperature", 0 if not given.get("do_sample") else 1))
    sampled = given.pop("do_sample", temperature > 0)
    top_k, top_p = int(given.pop("top_k", 0)), float(given.pop("top_p", 1))
    if given:
        raise UserError(f"{name} asks for the generation setting {', '.join(given)}, which is not "
                        "supported: do_sample, temperature, top_k, top_p, until and max_gen_toks "
                        "are")
    how = (temperature, top_k, top_p) if sampled and temperature > 0 else None
    return limit, [stop for stop in stops if stop], how


def drawing(how, model):
    """The `draw` of scoring.answer, with the same random numbers in every evaluation."""
    if how is None:
        return greedy_token
    temperature, top_k, top_p = how
    generator = torch.Generator(model.embed.weight.device).manual_seed(0)
    return functools.partial(draw_token, temperature=temperature, top_k=top_k, top_p=top_p,
                             generator=generator)
