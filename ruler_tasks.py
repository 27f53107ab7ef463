"""
The 13 tasks of RULER (arXiv 2404.06654): templates, numbers of needles, hops and repeats as
published in github.com/NVIDIA/RULER, scripts/data/synthetic and scripts/synthetic.yaml. ruler.py
fills a length with them and scores the answers.

    text, answers = TASKS["vt"].prompt(20, random.Random(0), sources, length=4096, i=0)

DEVIATIONS: names and values are never equal by chance; vt's example has 10 lines of noise, whatever
tokens they take; sentences end at ". ", "! " or "? ", not where nltk says.
"""
import functools
import json
import math
import random
import re
import string
import uuid
from typing import Callable, NamedTuple

from configurator import UserError, mismatch
from localfiles import first_line, optional
from needle import read_haystack

# --------------------------------------------------------------------------------------------------
# Prompts: templates, each with its answer prefix, as published

NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are")
NIAH_ONE = (NIAH.replace("Some", "A").replace("are all", "is")  # for one value
            .replace("are hidden", "is hidden").replace("text are", "text is"))
NEEDLE = "One of the special magic {kind} for {name} is: {value}."
NOISE = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
         "There and back again.")
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assgined the value {query}, they are: ")  # "assgined" is published
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:")
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text? Answer: According to the coded text above, the three most frequently appeared words "
    "are:")
QA = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nQuestion: {query} Answer:")


# --------------------------------------------------------------------------------------------------
# What prompts are made of

class Sources:
    """The texts and words that the tasks draw on; each is read when first asked for."""

    def __init__(self, cfg, subject, longest):
        self.cfg = cfg
        self.subject = subject
        self.longest = longest  # tokens of the longest prompt

    @functools.cached_property
    def essay(self):
        """(where the text of the niah tasks is from, its words)"""
        name, ids = read_haystack(self.cfg, self.subject)
        words = self.subject.tokenizer.decode(ids[:self.longest]).split()
        if not words:
            raise UserError(f"the haystack ({name}) holds no words: --haystack=FILE names another")
        return name, words

    @functools.cached_property
    def words(self):
        """{part of speech: list} of the package wonderwords, which RULER uses."""
        draw = optional("wonderwords").RandomWord()
        return {part: sorted(set(draw.filter(include_parts_of_speech=[part])))
                for part in ("nouns", "adjectives", "verbs")}

    @functools.cached_property
    def all_words(self):
        return sorted({word for words in self.words.values() for word in words})


class Question(NamedTuple):
    text: str
    answers: list  # each is right
    documents: list  # numbers of the documents that it is about
    near: list  # numbers of others that RULER prefers to any: of the same article


def read_json(path, shape, what):
    """The content of a JSON file of a known shape. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {first_line(e)}") from None
    if wrong := mismatch(content, shape, "the file"):
        raise UserError(f"{path} is not {what}: {wrong}")
    return content


@functools.cache
def read_questions(name, path):
    """
    (questions, documents) of "squad" or "hotpotqa". In the file, neighbours ask about one
    paragraph; here they come in a random order, the same in every evaluation.
    """
    read = {"squad": read_squad, "hotpotqa": read_hotpotqa}
    questions, documents = read[name](path)
    random.Random(0).shuffle(questions)
    return questions, documents


def read_squad(path):
    """SQuAD 2.0's dev-v2.0.json -> (questions that have an answer, documents)."""
    paragraph = {"context": str, "qas": [{"question": str, "answers": [{"text": str}]}]}
    data = read_json(path, {"data": [{"paragraphs": [paragraph]}]}, "SQuAD's dev-v2.0.json")
    articles = [article["paragraphs"] for article in data["data"]]
    documents = sorted({p["context"] for article in articles for p in article})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in articles:
        for p in article:
            own = number[p["context"]]
            near = [number[q["context"]] for q in article if q["context"] != p["context"]]
            questions += [Question(q["question"], [a["text"] for a in q["answers"]], [own], near)
                          for q in p["qas"] if q["answers"]]
    return questions, documents


def read_hotpotqa(path):
    """HotpotQA's hotpot_dev_distractor_v1.json -> (questions, documents)."""
    shape = [{"question": str, "answer": str, "context": [[None]]}]
    what = "HotpotQA's hotpot_dev_distractor_v1.json"
    data = read_json(path, shape, what)
    try:
        texts = [[f"{title}\n{''.join(lines)}" for title, lines in item["context"]]
                 for item in data]
    except (ValueError, TypeError):
        raise UserError(f"{path} is not {what}: a context is not [title, sentences]") from None
    documents = sorted({text for own in texts for text in own})
    number = {text: i for i, text in enumerate(documents)}
    questions = [Question(item["question"], [item["answer"]], [number[text] for text in own], [])
                 for item, own in zip(data, texts)]
    return questions, documents


# --------------------------------------------------------------------------------------------------
# The tasks: each writes a prompt with n units of context. A prompt with more units has the same
# names, values and words, and further ones.
#   rng: a random.Random, the same for every n    length: in tokens, what the prompt is to fill
#   i: the number of the sample, over all seeds
# Returns (text, right answers); None where there is no material for n units.

def fresh(draw, taken):
    """A result of draw() that is not in the set `taken`, to which it is added."""
    while True:
        found = draw()
        if found not in taken:
            taken.add(found)
            return found


def insert(pieces, places, others):
    """Insert others[j] into a list of pieces, before what now is pieces[places[j]] (ascending)."""
    for place, other in reversed(list(zip(places, others))):
        pieces.insert(place, other)


def niah(n, rng, sources, length, i, haystack, name="words", value="numbers", n_names=1, n_values=1,
         n_queries=1):
    """
    Needles in a haystack of n words of the essay, n lines of noise ("repeat") or n other needles
    ("needle"). name, value: what those of a needle are, "words", "numbers" or "uuids".
    """
    def word():
        return f"{rng.choice(sources.words['adjectives'])}-{rng.choice(sources.words['nouns'])}"

    draws = {"words": word, "numbers": lambda: str(rng.randint(10**6, 10**7 - 1)),
             "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))}
    taken = set()

    def draw(kind):
        return fresh(draws[kind], taken)

    def told(a_name, a_value):
        return NEEDLE.format(kind=value, name=a_name, value=a_value)
    # 1. the needles, and which are asked
    facts = []  # (a name, its values)
    for _ in range(max(n_names, n_queries)):
        facts.append((draw(name), [draw(value) for _ in range(n_values)]))
    needles = [told(a_name, a_value) for a_name, own in facts for a_value in own]
    rng.shuffle(needles)
    asked = facts[:n_queries]
    # 2. the haystack around them
    if haystack == "essay":
        words = sources.essay[1]
        text = " ".join(words[j % len(words)] for j in range(n))
        pieces = re.split(r"(?<=[.!?]) ", text)
        depths = rng.sample([round(100 * d / 39) for d in range(40)], len(needles))  # percent
        places = sorted(len(pieces) * depth // 100 for depth in depths)
    else:
        if haystack == "repeat":
            pieces = [NOISE] * n
        else:
            pieces = [told(draw(name), draw(value)) for _ in range(n)]
        places = sorted(rng.sample(range(n), len(needles)))
    insert(pieces, places, needles)
    context = (" " if haystack == "essay" else "\n").join(pieces)
    # 3. the question
    names = [a_name for a_name, _ in asked]
    query = names[0] if n_queries == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
    if n_queries * n_values == 1:
        text = NIAH_ONE.format(kind=value[:-1], context=context, query=query)
    else:
        text = NIAH.format(kind=value, context=context, query=query)
    return text, [a_value for _, own in asked for a_value in own]


EXAMPLE_LINES = 10  # of noise: as many as RULER fits into 500 tokens of a large vocabulary


def chain_text(n, rng, taken, n_chains, n_hops, letters):
    """Variable tracking without an example, in n lines of noise."""
    def name():
        return "".join(rng.choices(string.ascii_uppercase, k=letters))

    lines = [NOISE + "\n"] * n
    names, value = [], []
    for _ in range(n_chains):
        names.append([fresh(name, taken) for _ in range(n_hops + 1)])
        value.append(fresh(lambda: str(rng.randint(10000, 99998)), taken))
    for own, number in zip(names, value):
        chain = [f"VAR {own[0]} = {number}"]
        chain += [f"VAR {b} = VAR {a} " for a, b in zip(own, own[1:])]
        places = sorted(rng.sample(range(len(lines)), len(chain)))
        insert(lines, places, chain)
    return VT.format(context=" ".join(lines), query=value[0], count=n_hops + 1), names[0]


def variable_tracking(n, rng, sources, length, i, n_chains, n_hops):
    """A variable gets a value, another that variable, and so on: which have the value?"""
    taken = set()
    example, names = chain_text(EXAMPLE_LINES, rng, taken, n_chains, n_hops, letters=3)
    text, answers = chain_text(n, rng, taken, n_chains, n_hops, letters=5)
    return f"{example} {' '.join(names)}\n\n\n\n{text}", answers


def common_words(n, rng, sources, length, i, common, often, seldom):
    """A list of n words, of which `common` stand there often and the others seldom."""
    if n > len(sources.all_words):
        return None

    def text(n, often, seldom):
        taken = set()
        words = [fresh(lambda: rng.choice(sources.all_words), taken) for _ in range(n)]
        listed = words[:common] * often + words[common:] * seldom
        rng.shuffle(listed)
        return CWE.format(context=numbered(listed)), words[:common]

    short = length < 4096
    example, answers = text(20, 3, 1) if short else text(40, 10, 3)
    example += numbered(answers)
    own, answers = text(n, 6, 1) if short else text(n, often, seldom)
    return f"{example}\n{own}", answers


def numbered(words):
    return " ".join(f"{j}. {word}" for j, word in enumerate(words, 1))


ZETA = math.pi**2 / 6  # of 2, the exponent of the words' frequencies
# With so many words the fourth most frequent stands there more often than the fifth: the three
# that are asked for (the first is dots) are never a matter of chance.
FEWEST = math.ceil(ZETA / (1 / 4**2 - 1 / 5**2))


def frequent_words(n, rng, sources, length, i):
    """A text of about n coded words, the k-th of them as often as n / k² / zeta(2)."""
    taken = set()
    vocabulary = ["..."]
    for _ in range(max(5, length // 50) - 1):
        vocabulary.append(fresh(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), taken))
    words = []
    for k, word in enumerate(vocabulary, 1):
        words += [word] * int(n / k**2 / ZETA)
    rng.shuffle(words)
    return FWE.format(context=" ".join(words)), vocabulary[1:4]


def question_answering(n, rng, sources, length, i, file):
    """A question, and n documents of which one or two hold the answer."""
    questions, documents = read_questions(file, getattr(sources.cfg, file))
    question = questions[i % len(questions)]
    n = max(n, len(question.documents))
    if n > len(documents):
        return None
    near = rng.sample(question.near, len(question.near))
    chosen = list(dict.fromkeys(question.documents + near))[:n]
    taken = set(chosen)
    while len(chosen) < n:
        chosen.append(fresh(lambda: rng.randrange(len(documents)), taken))
    rng.shuffle(chosen)
    context = "\n\n".join(f"Document {j}:\n{documents[d]}" for j, d in enumerate(chosen, 1))
    return QA.format(context=context, query=question.text), question.answers


class Task(NamedTuple):
    write: Callable
    tokens: int  # to generate
    fewest: int  # units of context
    parameters: dict

    def prompt(self, n, rng, sources, length, i):
        return self.write(n, rng, sources, length, i, **self.parameters)


TASKS = {
    "niah_single_1": Task(niah, 128, 1, dict(haystack="repeat")),
    "niah_single_2": Task(niah, 128, 1, dict(haystack="essay")),
    "niah_single_3": Task(niah, 128, 1, dict(haystack="essay", value="uuids")),
    "niah_multikey_1": Task(niah, 128, 1, dict(haystack="essay", n_names=4)),
    "niah_multikey_2": Task(niah, 128, 1, dict(haystack="needle")),
    "niah_multikey_3": Task(niah, 128, 1, dict(haystack="needle", name="uuids", value="uuids")),
    "niah_multivalue": Task(niah, 128, 1, dict(haystack="essay", n_values=4)),
    "niah_multiquery": Task(niah, 128, 1, dict(haystack="essay", n_queries=4)),
    "vt": Task(variable_tracking, 30, 6, dict(n_chains=1, n_hops=4)),
    "cwe": Task(common_words, 120, 20, dict(common=10, often=30, seldom=3)),
    "fwe": Task(frequent_words, 50, FEWEST, {}),
    "qa_1": Task(question_answering, 32, 1, dict(file="squad")),
    "qa_2": Task(question_answering, 32, 1, dict(file="hotpotqa")),
}
