"""
How InfiniteBench scores answers: its published rules (github.com/OpenBMB/InfiniteBench,
src/compute_scores.py), written anew. Each takes a row and the list with its one answer, as
lm-eval's process_results does, and returns {"score": 0 to 1}.

DEVIATION: the rows, of MaxJeblick/InfiniteBench, hold the letter of the right option only; its text
is read from the question.
"""
import re
import string
from collections import Counter

# Chinese punctuation, as published there
CHINESE = ("！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠"
           "［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
           "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.")
RETRIEVAL = "\n:\"'.,?!{}"  # characters that separate words


def scored(rule):
    """rule(answer, row) -> a number, as a function for process_results."""
    def process_results(row, answers):
        return {"score": float(rule(answers[0], row))}
    return process_results


def words(text, separators):
    return text.translate(str.maketrans(dict.fromkeys(separators, " "))).split()


def after(text, prefixes):
    """What stands one character behind the first prefix that the text has; None without one."""
    for prefix in prefixes:
        _, found, rest = text.partition(prefix)
        if found:
            return rest[1:]
    return None


def overlap(answer, truth):
    """F1 of two lists of words."""
    same = sum((Counter(answer) & Counter(truth)).values())
    return 2 * same / (len(answer) + len(truth)) if same else 0


@scored
def first_number(answer, row):
    """passkey, number_string: the first run of digits is the key."""
    found = re.search("[0-9]+", answer)
    return found is not None and found[0] == row["answer"][0]


@scored
def word(answer, row):
    """kv_retrieval: the value is one of the words."""
    return row["answer"][0] in words(answer, RETRIEVAL)


@scored
def name(answer, row):
    """longdialogue_qa_eng: the character's name is one of the words."""
    return row["answer"][0] in [w.upper() for w in words(answer, RETRIEVAL)]


@scored
def number(answer, row):
    """math_find: the first number, whole or with a decimal point, is the one asked for."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    return found is not None and float(found[0]) == float(row["answer"][0])


@scored
def last_number(answer, row):
    """code_run: the last word is the value that the function returns."""
    *_, last = words(answer, "\n.`'\":") or [""]
    return re.fullmatch(r"[+-]?\d+", last) is not None and int(last) == int(row["answer"][0])


@scored
def leading_numbers(answer, row):
    """math_calc: the share of the intermediate values that are right, up to the first wrong one."""
    right = [int(value) for value in row["answer"]]
    n = 0
    for value, found in zip(right, re.findall("[0-9]+", answer)):
        if int(found) != value:
            break
        n += 1
    return n / len(right)


@scored
def letter(answer, row):
    """longbook_choice_eng: the letter at the beginning, behind "answer is", or the first alone."""
    answer = answer.strip()
    if not answer:
        return False
    if answer[0] in "ABCD":
        return answer[0] in row["answer"]
    answer = " ".join(words(answer, "\n\"'.,?!{}"))
    rest = after(answer, ("answer is:", "answer:", "answer is", "option is"))
    if rest is not None:
        return rest.startswith(tuple(row["answer"]))
    alone = [w for w in answer.split() if w in "ABCD"]
    return bool(alone) and alone[0] in row["answer"]


@scored
def option(answer, row):
    """code_debug: the letter, or the function's name behind "answer is:"."""
    right = row["answer"][0]
    answer = answer.strip()
    if answer[:2] in (f"{right}.", f"{right}:"):
        return True
    text = re.search(rf"^{right}\. (.*)$", row["question"], re.M)
    for separator in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        answer = answer.replace(separator, " ")
    rest = after(re.sub(" +", " ", answer), ("answer is:", "is:", "answer:", "correct option is:"))
    return bool(rest) and rest.startswith((right, text[1] if text else right))


@scored
def f1(answer, row):
    """longbook_qa_eng: F1 of the words without case, punctuation, articles; the best truth's."""
    def normal(text):
        text = text.lower().translate(str.maketrans("", "", string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()
    return max(overlap(normal(answer), normal(truth)) for truth in row["answer"])


@scored
def f1_chinese(answer, row):
    """longbook_qa_chn: F1 of the characters, without blanks and punctuation; the best truth's."""
    def normal(text):
        text = text.lower().translate(str.maketrans("", "", string.punctuation + CHINESE))
        return list("".join(text.split()))
    return max(overlap(normal(answer), normal(truth)) for truth in row["answer"])


@scored
def rouge(answer, row):
    """longbook_sum_eng: ROUGE-Lsum, F-measure; the best truth's."""
    from rouge_score.rouge_scorer import RougeScorer  # lm-eval installs it
    scores = RougeScorer(["rougeLsum"]).score_multi(row["answer"], answer)
    return scores["rougeLsum"].fmeasure
