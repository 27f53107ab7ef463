"""
LAMBADA: can a model guess the last word of a passage that people guess only from all of it?
(Paperno et al., 2016, https://arxiv.org/abs/1606.06031.) A part of eval.py.

    python eval.py --out_dir out --tasks=lambada                     # from the Hugging Face hub
    python eval.py --out_dir out --tasks=lambada --lambada=passages.jsonl --limit=500

The text is EleutherAI/lambada_openai, and passages are cut as in lm-eval's task lambada_openai:
the word behind the last blank, with its blank, is the target. Its accuracy says whether greedy
decoding would write it; its perplexity is exp of the mean loss of a whole word.
"""
import numpy as np

from configurator import UserError, say
from perplexity import exponential, ratio, with_error
from scoring import Progress, score
from texts import open_text

SETTINGS = "lambada limit"
COLUMN = "text"


def check(cfg, subject):
    """Refuse what cannot be measured, short of the network. Raises UserError."""
    if cfg.lambada:
        passages(cfg.lambada, cfg.limit, subject.tokenizer)


def passages(path, limit, tokenizer):
    """The texts of local files, or of the hub for "", `limit` of them (0 = all)."""
    from localfiles import block_texts
    _, source = open_text("lambada", tokenizer, "give --lambada=FILE.jsonl, a passage a line: "
                          f'{{"{COLUMN}": "…"}}', source=path)
    found = []
    for block in source.blocks(None):
        if block.kind == "fault":
            raise UserError(block.data[1])
        for text in block_texts(block, COLUMN, {}):
            if not text or text.isspace():
                raise UserError(f"{path or source.name}: row {len(found) + 1} holds no text "
                                f"{COLUMN!r}")
            found.append(text)
            if len(found) == limit:
                return found
    if not found:
        raise UserError(f"{path or source.name} holds no passage")
    return found


def last_word(text, tokenizer):
    """
    The ids of a passage: those before its last word, and those of the word.

    The whole is encoded and then cut, as lm-eval does. So the word has the tokens that it has in a
    text; encoded on its own it may have others, which the model has never seen there. Other blanks
    before the word are moved to it, since they may be one token with its own blank.
    """
    text = text.rstrip()
    context, _, word = text.rpartition(" ")
    context = context.rstrip()
    whole = tokenizer.encode(text if context else " " + word)
    cut = min(len(tokenizer.encode(context)), len(whole) - 1)  # the word has a token at least
    return whole[:cut], whole[cut:]


def measure(cfg, subject):
    texts = passages(cfg.lambada, cfg.limit, subject.tokenizer)
    return last_words(subject.model, texts, subject.tokenizer, subject.batcher)


def last_words(model, texts, tokenizer, batcher):
    """
    Returns a dict: accuracy and perplexity of the last words, each with its standard error;
    passages, and how many of them were truncated: their first tokens do not fit in the context.
    Raises UserError for a word that does not fit.
    """
    contexts, words = [], []
    truncated = 0
    for i, text in enumerate(texts):
        context, word = last_word(text, tokenizer)
        # The separator, the context and the word but its last token, which is only predicted
        room = model.config.block_size - len(word)
        if room < 0:
            raise UserError(f"the last word of passage {i + 1} has {len(word)} tokens, the "
                            f"model's context is {model.config.block_size}")
        truncated += len(context) > room
        context = context[max(0, len(context) - room):]
        contexts.append(np.append(tokenizer.separator, context))
        words.append([word])
    with Progress("lambada", len(texts)) as progress:
        scores = [row[0] for row in score(model, contexts, words, batcher, progress)]
    ones = np.ones(len(scores))
    accuracy, accuracy_error = ratio(np.array([s.greedy for s in scores], float), ones)
    loss, loss_error = ratio(np.array([-s.likelihood for s in scores]), ones)
    perplexity, perplexity_error = exponential(loss, loss_error)
    return {"accuracy": accuracy, "accuracy_stderr": accuracy_error,
            "perplexity": perplexity, "perplexity_stderr": perplexity_error,
            "passages": len(texts), "truncated": truncated}


def show(result):
    say(f"\nlambada, last word of {result['passages']:,} passages   "
        f"accuracy {with_error(result, 'accuracy', 4)}   "
        f"perplexity {with_error(result, 'perplexity', 2)}")
    if result["truncated"]:
        say(f"  {result['truncated']:,} passages are longer than the context: their first tokens "
            "are left out")


def summary(result):
    return {"lambada_accuracy": result["accuracy"], "lambada_perplexity": result["perplexity"]}
