"""
What the study trains and measures: variants of the demo, in parts. study.py runs them.

The demo (config/gsa_demo.py) has 2,400 steps. Parts with many variants take 1,000 or 400: their
tables name the steps, and their numbers compare with each other only.
"""
from typing import NamedTuple

from model import ARMS

# eval.py measures bits per byte of 100,000 tokens of each text, 150 needles, attention, stability
EVALUATE = "--tasks=needle,attention,stability --max_tokens=100000 --lengths=512"
# Too short to tell about retrieval: the seeds find 0.77, 0.19 and 0.28 of the needles at 512 tokens
SHORT = "--max_iters=1000 --short_iters=400 --index_warmup_iters=400"
# AdamW and no short windows
SPRINT = "--muon=false --max_iters=400 --short_iters=0 --index_warmup_iters=100"
RATES = ("1e-3", "3e-3", "1e-2", "3e-2")
BUDGETS = (16, 32, 64, 128, 256)  # values of k_base
LENGTHS = (512, 1024, 2048)  # one, two and four times the demo's context
# These read as many keys per query as `inverse` with the demo's k_base, 96: with the weights of a
# run of SHORT, inverse 76.2, fixed 75.8, eq8 74.0 at 128 and 77.2 at 144
FIXED = "--k_rule=fixed --k_base=100"
EQ8 = "--k_rule=eq8 --k_base=140"
YARN = ("--rope_scaling="
        "{'rope_type':'yarn','factor':4.0,'original_max_position_embeddings':512}")
LONGER = (f"--block_size=2048 {YARN} --batch_size=1 --max_iters=100 "
          "--short_iters=0 --index_warmup_iters=0 --warmup_iters=10 --log_interval=10 "
          "--learning_rate=3e-4 --min_lr=3e-5")


class Variant(NamedTuple):
    """What differs from config/gsa_demo.py, and how it is evaluated."""
    flags: str = ""  # of train.py; {seed} stands for the run's seed
    start: str = ""  # the variant whose weights it begins with
    trains: bool = True  # False: the weights of `start` are evaluated as they are
    evaluations: dict = {"": EVALUATE}  # {suffix of the numbers' names: flags of eval.py}
    may_break_down: bool = False  # a training that ends because its loss is not finite is a result


def at_lengths(more=""):
    """An evaluation at each of LENGTHS."""
    return {f"_at_{n}": f"--tasks=needle,attention --max_tokens=100000 --samples=5 "
                        f"--block_size={n} --lengths={n} {more}" for n in LENGTHS}


def reading(k, context=512):
    """eval.py's flag: each query reads k of at most `context` keys."""
    return f"--budget={{'k_rule':'fixed','k_base':{k},'k_min':1,'k_max':{context}}}"


def beyond_its_context(arm):
    """An arm as it was trained, with YaRN, and with YaRN and 100 more steps at 2048 tokens."""
    return {f"{arm}-beyond": Variant("", arm, False, at_lengths()),
            f"{arm}-yarn": Variant("", arm, False, at_lengths(YARN)),
            f"{arm}-continued": Variant(f"--attention={arm} {LONGER}", arm, True, at_lengths(YARN))}


PARTS = {  # {part: {variant's name: Variant}}
    # the demo as a newcomer runs it, with other data for each seed: an hour more, if asked for
    "demo": {"demo": Variant("--data=data/demo_{seed}")},
    "arms": {arm: Variant(f"--attention={arm}") for arm in ARMS},
    # G1 is the output gate, G2 the value gate; gsa has both
    "gates": {"no-gates": Variant("--value_gate=false --output_gate=false"),
              "G1": Variant("--value_gate=false"),
              "G2": Variant("--output_gate=false")},
    "rates": {f"{arm}-{rate}": Variant(
                  f"--attention={arm} --learning_rate={rate} "  # the indexer's stays 0.015
                  f"--index_lr_mult={0.015 / float(rate):g} {SPRINT}",
                  evaluations={"": "--tasks=attention,stability --max_tokens=20000"},
                  may_break_down=True)
              for arm in ARMS for rate in RATES},
    "budget": {"inverse": Variant(SHORT),
               "eq8": Variant(f"{EQ8} {SHORT}"),
               "fixed": Variant(f"{FIXED} {SHORT}"),
               **{f"k-{k}": Variant(f"--k_base={k} --k_min={k // 3} --k_max={k * 4 // 3} {SHORT}")
                  for k in BUDGETS}},
    # a trained gsa that reads other keys than in training; 512 are all
    "keys": {f"gsa-reads-{k}": Variant("", "gsa", False, {"": f"{EVALUATE} {reading(k)}"})
             for k in (16, 48, 192, 512)},
    # Recall grows with k, so all have the same fixed k; "fixed" has sigmoid, τ, RoPE, four heads.
    # Another number of heads changes all initial weights, which come from one random stream
    "indexer": {"relu": Variant(f"--index_activation=relu {FIXED} {SHORT}"),
                "no-tau": Variant(f"--index_temperature=false {FIXED} {SHORT}"),
                "no-rope": Variant(f"--index_rope=false {FIXED} {SHORT}"),
                "one-head": Variant(f"--n_index_head=1 {FIXED} {SHORT}"),
                "two-heads": Variant(f"--n_index_head=2 {FIXED} {SHORT}"),
                "no-warmup": Variant(f"{FIXED} {SHORT} --index_warmup_iters=0"),
                "short-warmup": Variant(f"{FIXED} {SHORT} --index_warmup_iters=100")},
    "long": {**beyond_its_context("dense"), **beyond_its_context("gsa"),
             "gsa-yarn-all": Variant("", "gsa", False,
                                     at_lengths(f"{YARN} {reading(2048, context=2048)}"))},
}
SEEDS = {"demo": (1, 2, 3, 4, 5, 6, 7, 8)}  # of the other parts: 1, 2, 3
VARIANTS = {name: variant for part in PARTS.values() for name, variant in part.items()}
