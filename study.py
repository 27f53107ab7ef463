"""
The study: which of the paper's claims hold on the demo, over several seeds. It trains the variants
of variants.py by train.py and measures them by eval.py, one run after the other. What was measured
goes into results/<variant>_<seed>.json, from which claims.py makes the README's "What holds".

    python study.py                              # seven to eight hours on two cores
    python study.py --only=arms,gates --seeds=1  # some parts, some seeds
    python study.py --table                      # the tables, from results/*.json
    python study.py --plot                       # the pictures, from results/*.json

An interrupted study goes on: a run that has its file is not repeated, a training is resumed. To
repeat a run, delete its file in results/ and its folder in out/study.
"""
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import claims
from configurator import (UserError, did_you_mean, duration, listed, only_one, parse, replacing,
                          run, say, to_json)
from data import differences
from records import (about_training, changed_settings, comparable, last_evaluation, read_config,
                     read_evaluation, split_text)
from settings import settings
from variants import PARTS, SEEDS, VARIANTS

OUT = "out/study"  # folder of the checkpoints, and of what the scripts print


@dataclass
class StudyConfig:
    only: str = ""  # parts, separated by commas: arms, gates …; default: all but demo
    seeds: str = ""  # "1,2"; default: those of each part
    table: bool = False  # write the tables
    plot: bool = False  # draw the pictures


def asked_for(cfg):
    """The runs that are asked for, (name of the variant, seed)."""
    if not all(seed.isdecimal() for seed in listed(cfg.seeds)):
        raise UserError(f"seeds {cfg.seeds!r} is not a list like 1,2")
    runs = []
    for name in listed(cfg.only) or [part for part in PARTS if part != "demo"]:
        if name not in PARTS:
            raise UserError(f"there is no part {name!r}{did_you_mean(name, PARTS)}")
        for seed in listed(cfg.seeds) or SEEDS.get(name, (1, 2, 3)):
            runs += [(variant, int(seed)) for variant in PARTS[name]]
    return runs


class Run:
    """One run of the study: a variant with a seed."""

    def __init__(self, name, seed):
        self.name, self.seed = name, seed
        self.variant = VARIANTS[name]
        self.start = None  # the run whose weights it takes
        if self.variant.start:
            self.start = Run(self.variant.start, seed)
        self.result = f"results/{name}_{seed}.json"
        self.log = f"{OUT}/{name}_{seed}.txt"  # what the scripts print
        # the folder of its checkpoint, and what train.py is asked for
        if self.variant.trains:
            self.folder = f"{OUT}/{name}_{seed}"
            origin = f"auto:{self.start.folder}" if self.start else "auto"
            self.flags = [*self.variant.flags.replace("{seed}", str(seed)).split(),
                          f"--seed={seed}", f"--out_dir={self.folder}", f"--init_from={origin}",
                          "--plot=false"]
        else:
            self.folder = self.start.folder
            self.flags = self.start.flags
        self.config = comparable(asdict(settings(["config/gsa_demo.py", *self.flags])))

    def is_done(self):
        """Is there a result? Raises UserError if it is one of other settings."""
        if not os.path.exists(self.result):
            return False
        with open(self.result, encoding="utf-8") as f:
            found = json.load(f)
        changed = differences(found["config"], changed_settings(self.config))
        if changed:
            raise UserError(f"{self.result} was trained with other settings ({changed}): delete it "
                            f"and {self.folder}")
        changed = differences(found["evaluations"], self.variant.evaluations)
        if changed:
            raise UserError(f"{self.result} was evaluated with other settings ({changed}): delete "
                            "it")
        return True

    def call(self, script, *flags):
        """Run a script, which prints into self.log. Returns its exit status and its last line."""
        with open(self.log, "a+", encoding="utf-8") as f:
            f.write(f"\n$ python {script} {shlex.join(flags)}\n")
            f.flush()
            process = subprocess.Popen([sys.executable, script, *flags], stdout=f, stderr=f)
            try:
                status = process.wait()
            except KeyboardInterrupt:
                process.wait()  # Ctrl-C has reached it, too: it saves a checkpoint
                raise
            f.seek(0)
            return status, f.read().splitlines()[-1]

    def must(self, script, *flags):
        """Run a script. Raises UserError if it fails."""
        status, last = self.call(script, *flags)
        if status:
            self.fail(f"{script} ended with status {status}: {last}")

    def fail(self, reason):
        raise UserError(f"{self.name}, seed {self.seed}: {reason} (see {self.log})")

    def prepare(self):
        """
        Prepare the data, unless they are there. Returns eval.py's --data: all documents, those with
        pass-keys, and those without.
        """
        data = self.config["data"]
        flags = ["--dataset=demo", f"--name={os.path.basename(data)}"]
        if data == f"data/demo_{self.seed}":  # of this variant, or of the one it starts from
            flags.append(f"--seed={self.seed}")
        self.must("prepare.py", *flags)
        return ",".join([data, *split_text(data)])

    def train(self):
        """Train, go on, or see that it is done. Returns why it broke down, "" if it did not."""
        if os.path.exists(f"{self.folder}/config.json"):
            changed = differences(read_config(self.folder)[0], self.config)
            if changed:
                self.fail(f"{self.folder} was trained with other settings ({changed}): delete it")
        if last_evaluation(self.folder) == self.config["max_iters"]:
            return ""
        status, last = self.call("train.py", "config/gsa_demo.py", *self.flags)
        if status and self.variant.may_break_down and "not finite" in last:
            return last
        step = last_evaluation(self.folder)
        if status or step < self.config["max_iters"]:
            self.fail(f"train.py ended with status {status} at step {step}: {last}")
        return ""

    def do(self):
        """Train, evaluate, and write the result."""
        began = time.time()
        texts = self.prepare()
        if self.start:
            self.start.train()
        broke_down = ""
        if self.variant.trains:
            broke_down = self.train()
        found = about_training(self.folder, broke_down)
        found["evaluations"] = self.variant.evaluations
        evaluations = {} if broke_down else self.variant.evaluations
        for suffix, flags in evaluations.items():
            self.must("eval.py", f"--out_dir={self.folder}", f"--data={texts}", *flags.split(),
                      "--plot=false")
            numbers, losses = read_evaluation(self.folder, suffix)
            found["numbers"] |= numbers
            found |= losses
        with replacing(self.result) as f:
            f.write(to_json({"variant": self.name, "seed": self.seed, "broke_down": broke_down,
                             **found}, indent=1) + "\n")
        say(f"{self.result} ({duration(time.time() - began)})")


def main(argv):
    cfg = StudyConfig(**parse(StudyConfig, argv))
    if cfg.table or cfg.plot:
        return claims.write("results", cfg.table, cfg.plot)
    runs = [Run(name, seed) for name, seed in asked_for(cfg)]
    os.makedirs("results", exist_ok=True)
    with only_one(OUT, "study.py"):
        missing = [one for one in runs if not one.is_done()]
        say(f"{len(runs) - len(missing)} of {len(runs)} runs are done")
        for one in missing:
            one.do()


if __name__ == "__main__":
    run(main)
