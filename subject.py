"""
What eval.py measures: a trained model, and what the parts of an evaluation need beside it.

    subject = Subject(cfg)     # cfg: eval.EvalConfig
    subject.model, subject.tokenizer, subject.batcher, subject.val, subject.lengths()
"""
import functools
from dataclasses import asdict

import numpy as np

import texts
from checkpoint import check_vocabulary, find_data, load_model, read_manifest
from configurator import UserError, did_you_mean, listed
from data import Data, check_ids
from device import dtype_of, use_device
from scoring import Batcher
from settings import TrainConfig
from tokenizer import open_tokenizer

# settings of a model that say how many keys it selects, see attention.Budget
BUDGET = {"k_rule": str, "k_base": int, "k_min": int, "k_max": int, "n_sink": int, "n_local": int}


def check_budget(budget):
    """Raises UserError if eval.py's --budget names no settings of a budget, or wrong values."""
    for name, value in budget.items():
        if name not in BUDGET:
            raise UserError(f"a budget has no {name!r}{did_you_mean(name, BUDGET)}")
        if type(value) is not BUDGET[name]:
            raise UserError(f"budget: {name} must be of type {BUDGET[name].__name__}, it is "
                            f"{value!r}")


class Subject:
    """
    model, checkpoint  as checkpoint.load_model returns them
    trained            the settings of the training, a dict
    T                  the model's context in tokens
    tokenizer, doc_mask, device
    dtype              that of the computation, see device.precision
    batcher            what scoring.score and scoring.answer take
    Raises UserError.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.device = use_device(cfg.device)
        self.dtype = dtype_of(self.device, cfg.dtype)
        longer = {"block_size": cfg.block_size, "rope_scaling": cfg.rope_scaling}
        changes = {name: value for name, value in longer.items() if value}
        check_budget(cfg.budget)
        self.model, self.checkpoint = load_model(cfg.out_dir, self.device, cfg.backend,
                                                 cfg.checkpoint, **changes, **cfg.budget)
        if cfg.budget and not self.model.config.sparse:
            raise UserError(f"{cfg.out_dir} has no indexer, so no budget: it reads all keys")
        self.trained = self.checkpoint["config"]
        self.T = self.model.config.block_size
        self.tokenizer = open_tokenizer(self.checkpoint["meta"], cfg.tokenizer)
        self.doc_mask = self.trained.get("doc_mask", True)
        self.batcher = Batcher(cfg.batch_size, self.device)
        self.texts = {}  # by name, see text()

    def text_names(self):
        """What cfg.data names, see texts.py; by default what the model was trained on."""
        return listed(self.cfg.data) or [find_data(self.checkpoint)]

    @functools.cached_property
    def data(self):
        """The first prepared folder of cfg.data, else that of the training."""
        folders = [name for name in self.text_names() if texts.kind_of_text(name) == "folder"]
        return self.folder(folders[0] if folders else find_data(self.checkpoint))

    def folder(self, path):
        """The Data of a prepared folder. Raises UserError if the model cannot read it."""
        data = Data(path)
        check_vocabulary(self.checkpoint, data.meta, path)
        check_ids(np.asarray(data.val), data.vocab_size)
        return data

    @property
    def val(self):
        """Ids of the validation text of `data`."""
        return np.asarray(self.data.val)

    def text(self, name, max_tokens=0):
        """The ids of a text, see texts.py; of a folder the validation text. Raises UserError."""
        if (name, max_tokens) not in self.texts:
            if texts.kind_of_text(name) == "folder":
                ids = np.asarray(self.folder(name).val)[:max_tokens or None]
            else:
                ids = texts.encode_text(name, self.tokenizer, max_tokens)
            self.texts[name, max_tokens] = ids
        return self.texts[name, max_tokens]

    def lengths(self):
        """cfg.lengths as a list of numbers of tokens; [] where it is not given."""
        try:
            lengths = sorted({int(n) for n in listed(self.cfg.lengths)})
        except ValueError:
            raise UserError(f"lengths {self.cfg.lengths!r} is not a list like 256,512") from None
        if lengths and (max(lengths) > self.T or min(lengths) < 1):
            raise UserError(f"lengths {lengths} must lie in the model's context, 1 to {self.T}: "
                            "--block_size (and --rope_scaling) make it longer")
        return lengths

    def facts(self):
        """Which model this is, for eval.json: what a fair comparison must know of it."""
        config = asdict(TrainConfig()) | self.trained  # what an older version lacks: its default
        meta = self.checkpoint["meta"]
        added = sum(p.numel() for name, p in self.model.named_parameters()
                    if "_gate." in name or ".indexer." in name)
        step_tokens = config["batch_size"] * config["grad_accum"] * config["block_size"]
        facts = {"step": self.checkpoint["step"],
                 "tokens_seen": self.checkpoint["step"] * step_tokens,
                 "arm": config.get("attention"), "seed": config.get("seed"),
                 "data": config["data"], "data_checksum": texts.meta_checksum(meta),
                 "vocabulary": meta["vocabulary"],
                 "parameters": sum(p.numel() for p in self.model.parameters()),
                 "gates_and_indexer": added,
                 "config": config}
        if not self.checkpoint["path"].endswith("ckpt.pt"):
            facts["files"] = read_manifest(self.checkpoint["path"])["files"]  # with their checksums
        return facts
