"""
harness.py and adapter.py: requests against naive loops and against lm-eval's own model for
transformers; local tasks end to end; what is refused. InfiniteBench's scores.
"""
import functools
import importlib.util
import json
import logging
import math
import random
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import adapter
import eval as evaluation
import harness
import sandbox
import scoring
import train
from configurator import UserError
from conftest import ROOT
from model import GSA, GSAConfig
from eval_results import as_read
from scoring import Answer, Batcher
from start import load_hf, open_gates_and_load
from test_scoring import SHAPE, greedy_ids, make, naive
from tokenizer import Tokenizer

pytest.importorskip("lm_eval")
TASKS = ROOT / "tests" / "tasks"
SEPARATOR = 256  # of the byte tokenizer
SETTINGS = dict(num_fewshot=-1, limit=0, run_generated_code=False, task_dir=str(TASKS))


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    """lm-eval's own tasks are not read, which takes ten seconds."""
    read = harness.task_manager
    monkeypatch.setattr(harness, "task_manager", lambda folders, defaults: read(folders, False))


def subject(model, rows=0, tokenizer="bytes"):
    return types.SimpleNamespace(model=model, tokenizer=Tokenizer(tokenizer),
                                 batcher=Batcher(rows), T=model.config.block_size)


def requests(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def settings(**changes):
    return types.SimpleNamespace(**SETTINGS | changes)


def measure(name, who, **changes):
    task = harness.Task(name, evaluation.PARTS)
    task.check(settings(**changes), who)
    return task.measure(settings(**changes), who)


def refused(call, words):
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module", params=["dense", "gsa"])
def model(request):
    return make(request.param)


def document(text):
    return [SEPARATOR, *text.encode()]


# -----------------------------------------------------------------------------
# Requests against loops over single tokens

def test_likelihoods_are_those_of_a_naive_loop(model):
    """
    Contexts with a common beginning, empty, ending in a blank, and longer than the model's 48
    tokens: then the last ones that fit are read. Two answers are what the model would write.
    """
    rng = random.Random(0)

    def word(n):
        return "".join(rng.choice("abc xyz") for _ in range(n))
    begin = word(14) + "!"
    contexts = [begin + word(3) + ".", begin + word(9) + ".", begin, "", "Q: ", word(60) + "."]
    pairs = [(c, word(n) + ".") for c in contexts for n in (1, 4, 7)]
    written = [(c, greedy_ids(model, document(c), 1)) for c in contexts[:3]]
    written = [(c, chr(i)) for c, (i,) in written if i < 128]
    assert written
    pairs += written
    expected = []
    for context, continuation in pairs:
        first = context.rstrip()
        rest = list((context[len(first):] + continuation).encode())
        expected.append(naive(model, document(first)[-(48 + 1 - len(rest)):], rest))
    assert all(greedy for _, greedy in expected[len(pairs) - len(written):])
    for rows in (0, 1, 4):
        who = adapter.Adapter(subject(model, rows))
        for pair, a, b in zip(pairs, who.loglikelihood(requests(*pairs)), expected, strict=True):
            assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1] == b[1], (rows, pair)
        assert who.counts["requests"] == len(pairs) and who.counts["truncated"] == 3


def test_rolling_likelihoods_are_those_of_windows_by_hand(model):
    """
    100 bytes in windows of 48: bytes 0-47 are predicted behind the separator, 48-95 behind byte
    47, and 96-99 with 48 tokens of context in the last window, which begins at byte 51.
    """
    text = "".join(random.Random(1).choice("abcdefgh ") for _ in range(99)) + "."
    ids = list(text.encode())
    expected = (naive(model, [SEPARATOR], ids[:48])[0] + naive(model, ids[47:48], ids[48:96])[0]
                + naive(model, ids[51:96], ids[96:])[0])
    short = naive(model, [SEPARATOR], list(b"short"))[0]
    for rows in (0, 1, 3):
        found = adapter.Adapter(subject(model, rows)).loglikelihood_rolling(
            requests((text,), ("short",), ("",)))
        assert found == pytest.approx([expected, short, 0.0], rel=1e-5), rows


def test_texts_that_begin_alike_are_not_all_in_one_batch(model, monkeypatch):
    """A batch holds at least a context with its continuations: 16 answers, or one window."""
    sizes = []

    def score(model, contexts, continuations, batcher, progress):
        sizes.append([len(row) for row in continuations])
        return scoring.score(model, contexts, continuations, batcher, progress)
    monkeypatch.setattr(adapter, "score", score)
    who = adapter.Adapter(subject(model))
    texts = ["abcdefgh"[i % 7:] for i in range(40)]
    rolling = who.loglikelihood_rolling(requests(*[(text,) for text in texts]))
    pairs = who.loglikelihood(requests(*[("", text) for text in texts]))
    assert sizes == [[1] * 40, [16, 16, 8]]
    assert rolling == pytest.approx([likelihood for likelihood, _ in pairs], rel=1e-5)


def test_texts_are_those_of_greedy_decoding(model):
    """A prompt of 60 tokens leaves room for 10 more of 48; the first text ends at its stop."""
    prompts = ["ab", "x" * 60, "some words"]
    written = [greedy_ids(model, document(p)[-38:], 10) for p in prompts]
    assert SEPARATOR not in sum(written, [])
    whole = [bytes(ids).decode(errors="replace") for ids in written]
    how = dict(max_gen_toks=10, do_sample=False, temperature=1.0)
    for rows in (1, 3):
        who = adapter.Adapter(subject(model, rows))
        assert who.generate_until(requests(*[(p, how | {"until": []}) for p in prompts])) == whole
        assert who.counts == dict(requests=3, truncated=1, answers=3, unfinished=3,
                                  answer_limit=10)
        stop = whole[0][2:4]
        text, = who.generate_until(requests(("ab", how | {"until": stop})))
        assert text == whole[0][:whole[0].index(stop)] and who.counts["unfinished"] == 3


def test_an_answer_may_take_half_of_the_context(model):
    who = adapter.Adapter(subject(model))
    who.generate_until(requests(("a prompt", {"max_gen_toks": 1000})))
    assert who.counts["answer_limit"] == 24 and who.counts["truncated"] == 0


def test_sampling_settings_are_obeyed_and_others_refused():
    read = functools.partial(adapter.read_generation, "task")
    assert read({}) == (256, [], None)
    assert read({"until": "\n", "max_new_tokens": 7, "temperature": 0.5, "do_sample": False}) == (
        7, ["\n"], None)
    assert read({"temperature": 0.5, "top_p": 0.9, "until": ["", "a"]}) == (
        256, ["a"], (0.5, 0, 0.9))
    assert read({"do_sample": True, "top_k": 3}) == (256, [], (1.0, 3, 1.0))
    assert read({"do_sample": True, "temperature": 0.0})[2] is None
    refused(lambda: read({"num_beams": 4}), "task asks for .* num_beams, which is not supported")
    model = make("dense")
    who = adapter.Adapter(subject(model))
    many = requests(*[("ab", dict(do_sample=True, temperature=3.0, max_gen_toks=6))] * 4)
    texts = who.generate_until(many)
    assert len(set(texts)) > 1  # four draws of one prompt
    assert who.generate_until(many) == texts  # of the same random numbers
    draw = adapter.drawing((3.0, 2, 1.0), model)
    logits = torch.randn(50, 257)
    top = logits.topk(2).indices
    assert all(token in row for token, row in zip(draw(logits), top))


def test_an_answer_longer_than_the_context_is_refused(model):
    who = adapter.Adapter(subject(model), "task")
    refused(lambda: who.loglikelihood(requests(("a", "x" * 49))), "49 tokens, the context 48")
    who.loglikelihood(requests(("a", "x" * 48)))


# -----------------------------------------------------------------------------
# lm-eval's own model for transformers, on one checkpoint

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama with a small byte-level BPE: (our subject, its model, its tokenizer)."""
    import transformers
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    folder = str(tmp_path_factory.mktemp("llama"))
    end = "<|endoftext|>"
    rows = (TASKS / "choice.jsonl").read_text().splitlines()
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        [json.loads(row)["text"] for row in rows],
        trainers.BpeTrainer(vocab_size=330, special_tokens=[end], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    trained.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, trained.token_to_id(end))])
    theirs_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token=end, eos_token=end, pad_token=end)
    theirs_tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=trained.get_vocab_size(), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0)).eval()
    for p in theirs.parameters():
        p.data += torch.randn_like(p) * 0.1
    theirs.save_pretrained(folder)
    start = load_hf(folder)
    model = GSA(GSAConfig.arm("dense", **start["model_config"]), "torch").eval()
    open_gates_and_load(model, start["model"], folder)
    return subject(model, tokenizer=folder), theirs, theirs_tokenizer


@pytest.mark.parametrize("name", ["passkey_choice", "passkey_generation", "passkey_rolling"])
def test_scores_equal_those_of_lm_evals_own_model(llama, name, monkeypatch):
    """
    To the last digit shown, with truncated contexts among them. add_bos_token lets contexts begin
    with the separator there, too; in rolling it would do so twice.
    """
    pytest.importorskip("accelerate")
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # slow, and not used
    ours, theirs, tokenizer = llama
    found = measure(name, ours)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    other = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=3, max_length=64,
                 add_bos_token=name != "passkey_rolling")
    manager = harness.find_tasks(name, str(TASKS))
    expected = lm_eval.evaluator.simple_evaluate(
        model=other, log_samples=True, bootstrap_iters=harness.BOOTSTRAPS, task_manager=manager,
        tasks=list(harness.load(name, manager, str(TASKS))["tasks"].values()))
    metrics = harness.read_metrics(expected["results"][name])
    assert found["metrics"][name].keys() == metrics.keys() and metrics
    for metric, one in metrics.items():
        for key, value in one.items():
            shown = harness.digits(found["metrics"][name][metric][key])
            assert shown == harness.digits(value), (metric, key)
    if name == "passkey_rolling":
        return
    assert found["truncated"] > 0
    # the answers behind the scores
    arguments = [sample["arguments"] for sample in expected["samples"][name]]
    answers = [sample["resps"] for sample in expected["samples"][name]]
    who = adapter.Adapter(ours)
    for args, theirs_found in zip(arguments[:12], answers):
        if name == "passkey_generation":
            assert who.generate_until(requests(*args)) == [theirs_found[0][0]]
        else:
            for a, (b,) in zip(who.loglikelihood(requests(*args)), theirs_found):
                assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1] == b[1]


# -----------------------------------------------------------------------------
# Tasks

def value_of(context):
    """What an oracle reads: the value of the key that the context ends with, "…AB="."""
    key = context[-3:]
    return re.search(rf"^{key}(\w+)$", context, re.M)[1]


def test_an_oracle_scores_100_percent_and_a_guesser_chance(monkeypatch, llama):
    def reading(self, wanted):
        return [(0.0 if value_of(r.args[0]) == r.args[1] else -9.0, False) for r in wanted]
    rng = random.Random(0)

    def guessing(self, wanted):
        return [(-rng.random(), False) for _ in wanted]

    def writing(self, wanted):
        return [value_of(r.args[0]) for r in wanted]
    monkeypatch.setattr(adapter.Adapter, "loglikelihood", reading)
    monkeypatch.setattr(adapter.Adapter, "generate_until", writing)
    choice = measure("passkey_choice", llama[0])["metrics"]["passkey_choice"]
    assert choice["acc"] == {"value": 1.0, "stderr": 0.0}
    written = measure("passkey_generation", llama[0])["metrics"]["passkey_generation"]
    assert written["exact_match"]["value"] == 1.0
    monkeypatch.setattr(adapter.Adapter, "loglikelihood", guessing)
    found = [measure("passkey_choice", llama[0])["metrics"]["passkey_choice"]["acc"]["value"]
             for _ in range(5)]
    # 200 guesses among four: standard error √(0.25 · 0.75 / 200) = 0.031
    assert abs(np.mean(found) - 0.25) < 3 * 0.031


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    """The folder of a demo model after two steps, and settings for a short evaluation."""
    folder = str(tmp_path_factory.mktemp("run"))
    shape = {key: value for key, value in SHAPE.items() if key != "vocab_size"}
    train.train(train.TrainConfig.arm(
        "gsa", **shape | dict(block_size=64), data=demo, out_dir=folder, attention="gsa",
        batch_size=2, max_iters=2, eval_iters=1, plot=False, device="cpu"))
    return functools.partial(evaluation.EvalConfig, out_dir=folder, max_tokens=100, plot=False)


def test_local_tasks_run_end_to_end_and_finished_ones_are_kept(run, tmp_path, capsys):
    """The second of four tasks cannot be measured: one line, and the others are there."""
    folder = tmp_path / "tasks"
    shutil.copytree(TASKS, folder)
    (folder / "broken.yaml").write_text(
        (folder / "choice.yaml").read_text().replace("passkey_choice", "broken")
        .replace("choice.jsonl", "broken.jsonl"))
    rows = [json.loads(row) for row in (folder / "choice.jsonl").read_text().splitlines()]
    del rows[2]["key"]
    (folder / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["passkey_choice", "passkey_generation", "passkey_rolling"]
    cfg = run(tasks=",".join([names[0], "broken", *names[1:]]), task_dir=str(folder))
    refused(lambda: evaluation.evaluate(cfg), "not measured, for the reasons above: broken")
    content = json.loads((Path(cfg.out_dir) / "eval.json").read_text())
    printed = capsys.readouterr().out
    assert "\nbroken skipped: broken: row 3 of its data lacks key\n" in printed
    assert content["skipped"] == {"broken": "broken: row 3 of its data lacks key"}
    assert list(content["results"]) == ["perplexity", *names]
    assert content["results"]["passkey_choice"]["rows"] == {"passkey_choice": 40}
    assert 0 <= content["summary"]["passkey_choice_acc"] <= 1
    assert content["summary"]["passkey_rolling_bits_per_byte"] == pytest.approx(
        content["summary"]["bits_per_byte"], rel=0.2)  # both untrained: about 8
    assert re.search(r"40 of 40 answers reached the limit of 8 tokens", printed)
    assert re.search(r"\d+ of 160 prompts did not fit into the context of 64 tokens", printed)
    refused(lambda: evaluation.evaluate(cfg), "not measured")
    assert capsys.readouterr().out.count("measured before") == 4
    few = evaluation.evaluate(run(tasks="passkey_choice", task_dir=str(folder), limit=5,
                                  num_fewshot=2))
    assert few["results"]["passkey_choice"]["rows"] == {"passkey_choice": 5}
    assert "(5 rows, 2 examples in a prompt)" in capsys.readouterr().out


def test_humaneval_runs_code_only_in_the_sandbox_and_with_leave(llama, tmp_path, monkeypatch):
    rows = [{"prompt": f"def add{i}(x):\n", "entry_point": f"add{i}",
             "test": f"def check(f):\n    assert f(1) == {1 + i}\n"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "code.yaml").write_text(
        f"include: {ROOT}/config/humaneval/humaneval.yaml\ntask: my_code\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: rows.jsonl}}\n")
    there = dict(task_dir=str(tmp_path))
    for name in ("my_code", "humaneval"):
        refused(lambda: measure(name, llama[0], **there), f"{name} runs code .*--run_generated")
    ran = []

    def passes(program):
        ran.append(program)
        return "x + 1" in program
    monkeypatch.setattr(sandbox, "passes", passes)
    monkeypatch.setattr(sandbox, "check", lambda: None)
    monkeypatch.setattr(adapter.Adapter, "generate_until",
                        lambda self, wanted: [f"    return x + {i}\n" for i in range(len(wanted))])
    found = measure("my_code", llama[0], **there, run_generated_code=True)
    assert found["metrics"]["my_code"]["pass@1"]["value"] == pytest.approx(1 / 3)
    assert ran[1] == ("def add1(x):\n    return x + 1\n\n"
                      "def check(f):\n    assert f(1) == 2\n\ncheck(add1)\n")


def test_code_is_not_run_unprotected(llama, tmp_path):
    """
    A task of lm-eval's own, here in a folder that is not --task_dir, by name, in a group and in a
    group of --task_dir.
    """
    text = (ROOT / "config/humaneval/humaneval.yaml").read_text()
    for old, new in ((": humaneval", ": mbpp"), ("openai/openai_humaneval", "json"),
                     ("{{prompt}}", "{{text}}"), ("{{test}}", "{{text}}"), ("{{entry_point}}", "")):
        text = text.replace(old, new)
    for folder in ("theirs", "own"):
        (tmp_path / folder).mkdir()
    (tmp_path / "theirs" / "mbpp.yaml").write_text(
        f"{text}dataset_kwargs: {{data_files: {{test: {TASKS}/rolling.jsonl}}}}\n")
    (tmp_path / "theirs" / "group.yaml").write_text("group: codes\ntask: [mbpp]\n")
    (tmp_path / "own" / "group.yaml").write_text("group: own_codes\ntask: [mbpp]\n")
    manager = harness.task_manager((str(tmp_path / "theirs"), str(tmp_path / "own")), False)
    there = settings(run_generated_code=True, task_dir=str(tmp_path / "own"))
    for name in ("mbpp", "codes", "own_codes"):
        task = harness.Task(name, evaluation.PARTS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(harness, "find_tasks", lambda *_: manager)
            refused(lambda: task.measure(there, llama[0]),
                    "mbpp would run generated code unprotected")


# -----------------------------------------------------------------------------
# Bad input

def test_an_unknown_task_is_answered_with_the_nearest_names(run, monkeypatch):
    refused(lambda: evaluation.evaluate(run(tasks="pasky_choice", task_dir=str(TASKS))),
            "unknown task 'pasky_choice': did you mean passkey_choice")
    refused(lambda: evaluation.evaluate(run(tasks="needel")), "did you mean needle")
    refused(lambda: evaluation.evaluate(run(tasks="wxyz", task_dir=str(TASKS))),
            "no YAML file of .*tasks that can be read holds it")
    refused(lambda: evaluation.evaluate(run(tasks="passkey_choice", task_dir="nowhere")),
            "task_dir 'nowhere' is not a folder")
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.task", None)
    refused(lambda: evaluation.evaluate(run(tasks="mmlu")), "mmlu.* pip install lm-eval")
    refused(lambda: evaluation.evaluate(run(tasks="needel")), "did you mean needle")


def test_without_network_one_line_says_what_to_do(llama, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'MaxJeblick/InfiniteBench' on the Hub") from OSError()
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused(lambda: measure("infinitebench_passkey", llama[0]),
            "infinitebench_passkey needs MaxJeblick/InfiniteBench .*cannot be reached.*data_files")


def test_a_file_that_is_not_there_is_one_line(llama, tmp_path):
    shutil.copy(TASKS / "choice.yaml", tmp_path)
    refused(lambda: measure("passkey_choice", llama[0], task_dir=str(tmp_path)),
            "passkey_choice cannot be loaded: .*choice.jsonl")
    (tmp_path / "choice.jsonl").touch()
    refused(lambda: measure("passkey_choice", llama[0], task_dir=str(tmp_path)),
            "passkey_choice cannot be loaded: there are no rows")
    (tmp_path / "choice.jsonl").write_text('{"text": "a\n')
    refused(lambda: measure("passkey_choice", llama[0], task_dir=str(tmp_path)),
            "passkey_choice cannot be loaded: JSON parse error")


def test_what_a_task_itself_raises_is_one_line_and_what_our_model_raises_is_not(
        llama, tmp_path, monkeypatch):
    text = (TASKS / "generation.yaml").read_text().replace("choice.jsonl", f"{TASKS}/choice.jsonl")
    (tmp_path / "generation.yaml").write_text(f"{text}process_results: !function rules.fail\n")
    (tmp_path / "rules.py").write_text("def fail(row, answers):\n    raise KeyError('a\\nb')\n")
    monkeypatch.setattr(adapter, "answer", lambda *_: [Answer("", False)])  # to one row
    there = dict(task_dir=str(tmp_path), limit=1)
    refused(lambda: measure("passkey_generation", llama[0], **there),
            "passkey_generation cannot be measured: KeyError: 'a")
    monkeypatch.setattr(adapter, "answer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure("passkey_generation", llama[0], **there)


def test_a_score_that_is_not_finite_is_shown_and_no_number_of_the_summary(
        llama, monkeypatch, capsys):
    monkeypatch.setattr(adapter.Adapter, "loglikelihood_rolling",
                        lambda self, wanted: [math.nan] * len(wanted))
    found = as_read(measure("passkey_rolling", llama[0]))
    task = harness.Task("passkey_rolling", [])
    task.show(found)
    assert re.search(r"bits_per_byte +-\n", capsys.readouterr().out)
    assert task.summary(found) == {}


def test_a_tag_names_tasks_and_a_group_weighs_them_by_their_rows(llama, tmp_path, monkeypatch):
    """Accuracies of 1 for 30 rows and 0 for 10: 0.75, with 1 / √n times the rows' deviation."""
    text = (TASKS / "choice.yaml").read_text() + "tag: two\n"
    rows = (TASKS / "choice.jsonl").read_text().splitlines(keepends=True)
    for name, own in (("long", rows[:30]), ("short", rows[:10])):
        (tmp_path / f"{name}.jsonl").write_text("".join(own))
        (tmp_path / f"{name}.yaml").write_text(
            text.replace("passkey_choice", name).replace("choice.jsonl", f"{name}.jsonl"))
    (tmp_path / "group.yaml").write_text(
        "group: both\ntask: [long, short]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    answers = iter(30 * [True] + 10 * [False])

    def reading(self, wanted):
        scores = []
        for first in range(0, len(wanted), 4):
            right = next(answers)
            scores += [(float((value_of(r.args[0]) == r.args[1]) == right), False)
                       for r in wanted[first:first + 4]]
        return scores
    monkeypatch.setattr(adapter.Adapter, "loglikelihood", reading)
    both = measure("both", llama[0], task_dir=str(tmp_path))
    assert both["metrics"]["both"]["acc"] == {"value": 0.75, "stderr": 0.0}
    assert harness.Task("both", []).summary(both) == {"both_acc": 0.75}
    answers = iter(40 * [True])
    found = measure("two", llama[0], task_dir=str(tmp_path))
    assert harness.Task("two", []).summary(found) == {
        f"{name}_{metric}": 1 for name in ("long", "short") for metric in ("acc", "acc_norm")}


# -----------------------------------------------------------------------------
# InfiniteBench

def infinitebench_scores():
    path = ROOT / "config" / "infinitebench" / "scores.py"
    spec = importlib.util.spec_from_file_location("scores", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OPTIONS = "Which?\n\nOptions:\nA. read_all\nB. sum_up\nC. main\nD. write"
EXAMPLES = [  # rule, the row's answers, what the model writes, score by the published rule
    ("first_number", ["71432"], "is 71432. Remember 5", 1),
    ("first_number", ["71432"], "714320", 0),
    ("first_number", ["71432"], "none", 0),
    ("word", ["0a-1b"], ' "0a-1b"}, "', 1),
    ("word", ["0a-1b"], "0a-1bc", 0),
    ("name", ["ACE", "ACE ROTHSTEIN"], ' Ace: "No."', 1),
    ("name", ["ACE"], "Aceh", 0),
    ("number", ["12"], "is 12, 13", 1),
    ("number", ["0.5"], "0.5", 1),
    ("number", ["12"], "-", 0),
    ("last_number", ["-7"], "The value is `-7`.", 1),
    ("last_number", ["7"], "7 or so", 0),
    ("last_number", ["7"], "", 0),
    ("leading_numbers", ["1", "4", "8", "9"], "[1, 4, 7, 9]", 0.5),
    ("leading_numbers", ["1", "4"], "1", 0.5),
    ("letter", ["B"], " B. Because", 1),
    ("letter", ["B"], "the answer is: B", 1),
    ("letter", ["B"], "I say, B or C", 1),
    ("letter", ["B"], "the answer is", 0),
    ("letter", ["B"], "", 0),
    ("option", ["B"], " B. sum_up", 1),
    ("option", ["B"], "The answer is: sum_up", 1),
    ("option", ["B"], "The answer is: A", 0),
    ("option", ["B"], "sum_up", 0),  # the published rule wants "is:" before a name
    # 2 of 3 words are right, 2 of 2 found: 2 · 2 / (3 + 2)
    ("f1", ["no one", '"Peyton Bronwyn"'], "The Peyton, Bronwyn child", 0.8),
    ("f1", ["ha ha ha"], "ha ha", 0.8),  # 2 · 2 / (2 + 3)
    ("f1", ["Peyton"], "nobody", 0),
    ("f1_chinese", ["北京"], "北京市。", 0.8),
    ("rouge", ["one two\nthree"], "one two\nthree", 1),
    ("rouge", ["one two"], "three", 0),
]


@pytest.mark.parametrize("rule,answers,text,expected", EXAMPLES)
def test_infinitebench_scores_follow_the_published_rules(rule, answers, text, expected):
    row = {"answer": answers, "question": OPTIONS}
    found = getattr(infinitebench_scores(), rule)(row, [text])
    assert found == {"score": pytest.approx(expected)}


def test_all_infinitebench_tasks_run_on_local_rows(llama, monkeypatch):
    import datasets
    asked = []

    def load(path, name, **_):
        asked.append((path, name))
        rows = [{"context": "A long text. ", "question": OPTIONS, "answer_prefix": "It is",
                 "answer": ["A"] if name in ("code_debug", "longbook_choice_eng") else ["7"]}] * 2
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = measure("infinitebench", llama[0])
    assert len(found["rows"]) == 12 and set(found["rows"].values()) == {2}
    assert {path for path, _ in asked} == {"MaxJeblick/InfiniteBench"}
    names = {name.removeprefix("infinitebench_") for name in found["rows"]}
    assert names == {name for _, name in asked}
    tasks = [found["metrics"][name]["score"]["value"] for name in found["rows"]]
    mean = found["metrics"]["infinitebench"]["score"]["value"]
    assert mean == pytest.approx(np.mean(tasks))
    assert harness.Task("infinitebench", []).summary(found) == {"infinitebench_score": mean}
    assert len(found["shown"]) == 13
    monkeypatch.setattr(harness, "ROWS_SHOWN", 12)
    assert measure("infinitebench", llama[0])["shown"] == ["infinitebench"]
