"""
What the study keeps of a run: numbers, settings, commit and a short log, from the files that
train.py and eval.py have written into its folder.
"""
import json
import re
from dataclasses import asdict
from statistics import median

from checkpoint import load_checkpoint
from configurator import replacing, to_json
from data import Data
from needle import split_documents
from outdir import read_log
from settings import TrainConfig
from stability import Stability
from tokenizer import open_tokenizer

LOGGED = ("kind", "step", "loss", "index_loss", "recall", "k_t", "grad_norm")
# 0 in a new run: they follow from data and other settings. A run that begins with the weights of
# another one writes them out
FOLLOWING = ("vocab_size", "d_head", "d_mlp")
TEXT_TOKENS = 2000  # of a validation document that are measured: else a few long ones decide


def changed_settings(config):
    """The settings of train.py that differ from its defaults, as JSON holds them."""
    default = asdict(TrainConfig())
    return json.loads(to_json({name: value for name, value in config.items()
                               if value != default[name]}))


def comparable(config):
    """The settings of train.py that say whether two runs are the same."""
    return {name: value for name, value in config.items() if name not in FOLLOWING}


def read_config(folder):
    """Comparable settings, and the commit, of the run in a folder."""
    with open(f"{folder}/config.json", encoding="utf-8") as f:
        config = json.load(f)
    commit = config.pop("git_commit")
    return comparable(config), commit


def last_evaluation(folder):
    """The last step that was evaluated in training, 0 = none. The end of a run always is."""
    return max((record["step"] for record, _ in read_log(f"{folder}/log.jsonl")
                if record["kind"] == "eval"), default=0)


def split_text(data):
    """
    Write the documents of the validation text with pass-keys, and those without, into two files
    beside the data: the first TEXT_TOKENS tokens of each. Returns their names.
    """
    loaded = Data(data)
    tokenizer = open_tokenizer(loaded.meta)
    names = [f"{data}/passkeys.jsonl", f"{data}/text.jsonl"]
    for name, docs in zip(names, split_documents(loaded.val[:], tokenizer)):
        with replacing(name) as f:
            for doc in docs:
                f.write(to_json({"text": tokenizer.decode(doc[:TEXT_TOKENS])}) + "\n")
    return names


def read_evaluation(folder, suffix):
    """
    Of a run's eval.json: {name + suffix: number} of the model's size and the summary, and
    {"loss_by_position" + suffix: [[tokens seen, at most; nats per token], …]} on the validation
    text. "bits_per_byte_of_data/demo/text.jsonl" becomes "bits_per_byte_text".
    """
    with open(f"{folder}/eval.json", encoding="utf-8") as f:
        content = json.load(f)
    numbers = {name: content["model"][name] for name in ("parameters", "gates_and_indexer")}
    for label, value in content["summary"].items():
        label = re.sub(r"_of_.*/(\w+)\.jsonl$", r"_\1", label) + suffix
        numbers[re.sub(r"(_at_\d+)\1$", r"\1", label)] = value  # needles name their length, too
    buckets = content["results"]["perplexity"]["rows"][0]["by_position"]
    return numbers, {f"loss_by_position{suffix}": [[bucket["to"], bucket["loss"]]
                                                   for bucket in buckets]}


def about_training(folder, broke_down):
    """
    A run's commit and settings, the seconds of its training, about twenty records of its log, and
    as its numbers: loss and index loss of its last evaluation; tokens/s, the median after index
    warm-up and short windows; spikes per 1,000 of the last 1,000 steps, see recent_spikes.
    """
    config, commit = read_config(folder)
    records = [record for record, _ in read_log(f"{folder}/log.jsonl")]
    train = [record for record in records if record["kind"] == "train"]
    warmup_iters = config["index_warmup_iters"] if config["sparse"] else 0
    settled = max(config["short_iters"], warmup_iters)
    numbers = {}
    if not broke_down:
        last = records[-1]
        numbers = {name: last[name] for name in ("loss", "index_loss") if last.get(name)}
        numbers["tokens_per_second"] = median(record["tokens_per_second"] for record in train
                                              if record["step"] > settled)
        losses = load_checkpoint(folder)["stability"]["losses"]
        numbers["spikes_within_50_per_1000_steps"] = 1000 * recent_spikes(losses) / len(losses)
    kept = train[::max(1, len(train) // 16)]
    kept += [record for record in records if record["kind"] == "eval"]
    log = [{name: record[name] for name in LOGGED if name in record} for record in kept]
    return {"commit": commit, "config": changed_settings(config),
            "seconds": round(all_seconds(train)), "numbers": numbers, "log": log}


def all_seconds(records):
    """The seconds of a training. Its log counts them from 0 again where it was resumed."""
    seconds = [record["seconds"] for record in records]
    return sum(now for now, then in zip(seconds, [*seconds[1:], 0]) if then < now)


def recent_spikes(losses):
    """Spikes as stability.Stability counts them, among 50 losses: a short run has no 1,000."""
    class Recent(Stability):
        WINDOW = 50
    recent = Recent()
    return sum(recent.observe(loss, skipped=False) for loss in losses)
