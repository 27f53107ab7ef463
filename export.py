"""
Write a trained model as a folder that the package transformers loads:

    python model.py --export out --to hf_out
    model = AutoModelForCausalLM.from_pretrained("hf_out", trust_remote_code=True)

The folder holds the weights, config.json, modeling_gsa.py with the files of this project that it
needs, and the tokenizer or, in README.md, how to use it. Nothing else of this project is needed
there. The export itself does not need transformers.
"""
import ast
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass

from checkpoint import load_model
from configurator import UserError, parse, say
from tokenizer import full_name
from tokenizer_hf import find_tokenizer
from weights import save_tensors

HERE = os.path.dirname(os.path.abspath(__file__))

README = """\
# A model with Gated Sparse Attention

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
ids = [{separator}]  # + the tokens of a text
print(model.generate(torch.tensor([ids]), max_new_tokens=100))
```

- A document begins with the separator, token {separator}, also in training.
  Attention {reach}.
- Tokens: {tokens}
- A batch is padded on the left, with an attention_mask. At most {block_size} tokens fit.
- Its weights are float32. To compute in bfloat16 use `torch.autocast`: a model loaded in bfloat16
  also rounds the scores that choose keys.
- On a GPU the package triton is needed, or `from_pretrained(…, backend="torch")`.
"""

TOKENS = {  # how text becomes tokens, by the kind of tokenizer (tokenizer.py)
    "bytes": "the bytes of the text in UTF-8, `list(text.encode())`.",
    "ranks": "as Llama 3 splits text (package tiktoken), with the ranks of the file `{name}`.",
    "hf": """\
`AutoTokenizer.from_pretrained("{place}", trust_remote_code=True)`, called with
  add_special_tokens=False and split_special_tokens=True. In training no blank was put before a
  text; where this tokenizer puts one (▁ of Llama 2 and Mistral), the first word differs.""",
    "encoding": "`tiktoken.get_encoding(\"{name}\").encode(text, disallowed_special=())`.",
}


# --------------------------------------------------------------------------------------------------
# The code: transformers imports it as a package, so our files import one another as ".name" there

def is_ours(name):
    return os.path.isfile(os.path.join(HERE, f"{name}.py"))


def as_package(source):
    """
    (source with relative imports of this project's modules, the names of these modules).
    "import kernels" -> "from . import kernels"; "from checks import x" -> "from .checks import x".
    What the file does as a script, its last statement, is left out.
    """
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    last = tree.body[-1]
    if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
        lines = lines[:last.lineno - 1]
        tree.body.pop()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = {alias.name for alias in node.names if is_ours(alias.name)}
            old, new = "import ", "from . import "
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = {node.module} if is_ours(node.module) else set()
            old, new = "from ", "from ."
        else:
            continue
        names |= found
        if found:
            i = node.lineno - 1
            lines[i] = lines[i].replace(old, new, 1)
    return "".join(lines).rstrip() + "\n", names


def sources(entry):
    """{name: source} of a module of this project and of those that it needs, as a package."""
    found = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name not in found:
            with open(os.path.join(HERE, f"{name}.py"), encoding="utf-8") as f:
                found[name], needed = as_package(f.read())
            waiting += needed
    # transformers fetches the files that it sees in lines "from .name import", and no others
    found[entry] += "\n# For transformers' loader, which fetches the files that such lines name\n"
    for name in sorted(set(found) - {entry}):
        found[entry] += f"from .{name} import __name__ as _\n"
    return found


# --------------------------------------------------------------------------------------------------
# The settings and the tokenizer

def config_json(model, checkpoint):
    """The content of config.json: see modeling_gsa.GSAModelConfig."""
    c = model.config
    separator = checkpoint["meta"]["separator"]
    return {
        "architectures": ["GSAForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_gsa.GSAModelConfig",
                     "AutoModelForCausalLM": "modeling_gsa.GSAForCausalLM"},
        "model_type": "gsa",
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.d_head,
        "max_position_embeddings": c.block_size,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "pad_token_id": separator,  # attention_mask says what is padding
        "separator": separator,
        "doc_mask": checkpoint["config"].get("doc_mask", True),
        "gsa": asdict(c),
    }


def tokenizer_json(name):
    """
    The path of the tokenizer.json that a tokenizer's name means, fetched if it is on the hub; ""
    for a tokenizer of another kind, and for one that has moved or cannot be fetched.
    """
    try:
        kind, _, place = full_name(name).partition(":")
        return find_tokenizer(place) if kind == "hf" else ""
    except UserError:
        return ""


def copy_tokenizer(path, folder):
    """Copy a tokenizer.json, and what transformers wants beside it."""
    shutil.copyfile(path, os.path.join(folder, "tokenizer.json"))
    settings = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    copy = os.path.join(folder, "tokenizer_config.json")
    if os.path.isfile(settings):
        shutil.copyfile(settings, copy)
    else:
        write_json(copy, {"tokenizer_class": "PreTrainedTokenizerFast"})


def how_to_tokenize(name, copied, folder):
    """How text becomes tokens, in words. copied: the folder has the tokenizer's files."""
    kind, _, place = name.partition(":")
    if copied:
        kind, place = "hf", folder
    elif kind in ("llama3", "tiktoken"):
        kind = "ranks"
    elif kind not in TOKENS:
        kind = "encoding"
    return TOKENS[kind].format(name=name, place=place)


def readme(config, tokens, folder):
    """The text of README.md. tokens: what how_to_tokenize says."""
    reach = "stops at the beginning of the document" if config["doc_mask"] else "goes on over it"
    return README.format(folder=folder, separator=config["separator"], reach=reach,
                         tokens=tokens, block_size=config["max_position_embeddings"])


# --------------------------------------------------------------------------------------------------

def write_json(path, content):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.write("\n")


def write_model(folder, name, model, checkpoint):
    """Fill an empty folder. name: what README.md calls it."""
    # 1. weights, under the names that they have in modeling_gsa.GSAForCausalLM
    weights = {f"model.{key}": x for key, x in model.state_dict().items()}
    save_tensors(os.path.join(folder, "model.safetensors"), weights, {"format": "pt"})
    # 2. settings
    config = config_json(model, checkpoint)
    write_json(os.path.join(folder, "config.json"), config)
    # 3. code
    for module, source in sources("modeling_gsa").items():
        with open(os.path.join(folder, f"{module}.py"), "w", encoding="utf-8") as f:
            f.write(source)
    shutil.copyfile(os.path.join(HERE, "LICENSE"), os.path.join(folder, "LICENSE"))
    # 4. tokenizer
    tokenizer = checkpoint["meta"]["tokenizer"]
    path = tokenizer_json(tokenizer)
    if path:
        copy_tokenizer(path, folder)
    tokens = how_to_tokenize(tokenizer, bool(path), name)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as f:
        f.write(readme(config, tokens, name))


@dataclass
class ExportConfig:
    export: str = "out"  # folder of the training run
    to: str = ""  # the new folder
    checkpoint: str = "last"  # last | best (lowest validation loss) | a step


def export(cfg):
    """Write the folder cfg.to, all of it or nothing. Raises UserError."""
    if not cfg.to:
        raise UserError("name the new folder: --to=hf_out")
    if os.path.exists(cfg.to) and not (os.path.isdir(cfg.to) and not os.listdir(cfg.to)):
        raise UserError(f"{cfg.to} exists and is not an empty folder: give --to a new name")
    model, checkpoint = load_model(cfg.export, which=cfg.checkpoint)
    target = os.path.abspath(cfg.to)
    parent, name = os.path.split(target)
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}.") as unfinished:
        folder = os.path.join(unfinished, name)
        os.mkdir(folder)
        write_model(folder, name, model, checkpoint)
        os.rename(folder, target)
    say(f"{cfg.to} holds the model: "
        f"AutoModelForCausalLM.from_pretrained({cfg.to!r}, trust_remote_code=True)")


def main(argv):
    export(ExportConfig(**parse(ExportConfig, argv)))
