"""
Reading Hugging Face checkpoints of the Llama and Qwen families: config.json and safetensors.

    config, weights, metadata = hf.load("meta-llama/Llama-3.2-1B")  # or a folder
    model = GSA(GSAConfig.arm("gsa", **config | {"block_size": 8192}))
    start.open_gates_and_load(model, weights, metadata["folder"])

Their layout is ours: the two halves of a head are rotated in pairs, as in layers.RoPE, and a
projection's matrix is (out, in). Only names differ, gate_proj and up_proj are joined, and the
embedding gets rows up to a multiple of 64.
"""
import json
import os
import re

import torch

from configurator import UserError, mismatch
from model import GSA, GSAConfig
from weights import load_tensors, refuse

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"

# The entries of config.json that are read: those that must be there, those that may be
NEEDED = {
    "architectures": [str], "vocab_size": int, "max_position_embeddings": int,
    "num_hidden_layers": int, "num_attention_heads": int, "hidden_size": int,
    "intermediate_size": int,
}
OPTIONAL = {
    "num_key_value_heads": int, "head_dim": int, "tie_word_embeddings": bool,
    "attention_bias": bool, "mlp_bias": bool, "use_sliding_window": bool, "layer_types": [str],
    "rope_parameters": {}, "rope_scaling": {},
}

# Our names of modules -> theirs, whose tensors lie one behind the other in ours
OUTSIDE = {
    "embed": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "unembed": ["lm_head"],
}
IN_LAYER = {
    "norm1": ["input_layernorm"],
    "attn.wq": ["self_attn.q_proj"],
    "attn.wk": ["self_attn.k_proj"],
    "attn.wv": ["self_attn.v_proj"],
    "attn.wo": ["self_attn.o_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "norm2": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}


def load(path_or_id, dtype=torch.float32):
    """
    A checkpoint in a folder, or of the hub (an id like Qwen/Qwen3-0.6B, fetched once). Returns
        the settings of GSAConfig that the model has, as a dict. block_size is the longest context
            that it was made for; a shorter one makes smaller tables;
        {parameter name of ours: tensor of `dtype`}, in CPU memory, all that a dense GSA needs;
        {"folder": …, "architecture": …, "tokenizer": path of tokenizer.json, "" without}.
    Raises UserError, in one line, for what is missing, damaged or not supported.
    """
    folder = find(path_or_id)
    path = os.path.join(folder, CONFIG)
    theirs = read_json(path, {})
    config = read_config(theirs, path)
    weights = convert(read_tensors(folder), config, folder, dtype)
    tokenizer = os.path.join(folder, TOKENIZER)
    metadata = {
        "folder": folder,
        "architecture": theirs["architectures"][0],
        "tokenizer": tokenizer if os.path.exists(tokenizer) else "",
    }
    return config, weights, metadata


# --------------------------------------------------------------------------------------------------
# Files

def find(path_or_id):
    """The folder of a checkpoint; one of the hub is fetched into the hub's cache."""
    if os.path.isdir(path_or_id):
        return path_or_id
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_id):
        raise UserError(f"there is no folder {path_or_id}")
    import huggingface_hub  # comes with datasets
    files = [CONFIG, "model*.safetensors", INDEX, "tokenizer*"]
    try:
        return huggingface_hub.snapshot_download(path_or_id, allow_patterns=files)
    except Exception as e:  # no network, no such model, no permission: each raises its own type
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"{path_or_id} is no folder and cannot be fetched ({reason}): put its "
                        f"{CONFIG}, *.safetensors and {TOKENIZER} into a folder, and name that"
                        ) from None


def read_json(path, shape):
    """The dict in a file, with at least the entries of `shape` (see configurator.mismatch)."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON") from None
    if wrong := mismatch(value, shape):
        raise UserError(f"{path} is damaged: {wrong}")
    return value


def read_tensors(folder):
    """{their name: tensor} of model.safetensors, or of the shards that its index names."""
    path = os.path.join(folder, WEIGHTS)
    index = os.path.join(folder, INDEX)
    if os.path.exists(path):
        return load_tensors(path)
    if not os.path.exists(index):
        raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    tensors = {}
    shards = read_json(index, {"weight_map": {}})["weight_map"].values()
    for shard in sorted({str(name) for name in shards}):
        if os.path.basename(shard) != shard:
            raise UserError(f"{index} names a file in another folder, {shard}")
        tensors |= load_tensors(os.path.join(folder, shard))
    return tensors


# --------------------------------------------------------------------------------------------------
# config.json

def read_config(theirs, path):
    """The settings of GSAConfig that a config.json (a dict) says. Raises UserError."""
    # null means the same as nothing, there and in transformers
    theirs = {key: value for key, value in theirs.items() if value is not None}
    present = {key: shape for key, shape in OPTIONAL.items() if key in theirs}
    wrong = mismatch(theirs, NEEDED | present)
    if wrong:
        raise UserError(f"{path} is damaged: {wrong}")
    wrong = unsupported(theirs)
    if wrong:
        raise UserError(f"{path}: {wrong} is not supported; it takes one of "
                        f"{', '.join(ARCHITECTURES)}, with full attention and unquantized")
    architecture = theirs["architectures"][0]
    attention_bias = False
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        attention_bias = theirs.get("attention_bias", False)
    rope_base, rope_scaling = read_rope(theirs)
    config = dict(
        vocab_size=theirs["vocab_size"],
        block_size=theirs["max_position_embeddings"],
        n_layer=theirs["num_hidden_layers"],
        n_head=theirs["num_attention_heads"],
        n_kv_head=theirs.get("num_key_value_heads", theirs["num_attention_heads"]),
        n_embd=theirs["hidden_size"],
        d_head=theirs.get("head_dim", 0),
        d_mlp=theirs["intermediate_size"],
        tie_embed=theirs.get("tie_word_embeddings", False),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and theirs.get("mlp_bias", False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        norm_eps=theirs.get("rms_norm_eps", 1e-6),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
    )
    try:
        full = GSAConfig.arm("dense", **config)
    except (ValueError, OverflowError) as e:
        raise UserError(f"{path}: {e}") from None
    numbers = {name: float(config[name]) for name in ("norm_eps", "rope_base")}  # not 10000
    return config | {"d_head": full.d_head} | numbers


def unsupported(theirs):
    """What of a config.json our model does not have; "" = nothing."""
    architecture = (theirs["architectures"] or ["none"])[0]
    if architecture not in ARCHITECTURES:
        return f"architecture {architecture}"
    if theirs.get("hidden_act", "silu") != "silu":
        return f"hidden_act {theirs['hidden_act']!r}"
    if "quantization_config" in theirs:
        return "quantization_config"
    if theirs.get("partial_rotary_factor", 1) != 1:
        return "partial_rotary_factor"
    # Qwen's sliding_window counts only where use_sliding_window is set, Mistral's always
    sliding = theirs.get("use_sliding_window", False)
    if architecture == "MistralForCausalLM":
        sliding = "sliding_window" in theirs
    if sliding or set(theirs.get("layer_types", [])) - {"full_attention"}:
        return "sliding_window"
    return ""


def read_rope(theirs):
    """
    (rope_base, rope_scaling) of a config.json. transformers 5 writes rope_parameters with
    rope_theta in it, transformers 4 wrote rope_theta and rope_scaling, before that with "type".
    """
    given = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    scaling = {key: value for key, value in given.items() if value is not None}
    base = scaling.pop("rope_theta", theirs.get("rope_theta", 10000.0))
    kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", kind)
    if scaling.get("partial_rotary_factor") == 1:
        del scaling["partial_rotary_factor"]
    if kind == "default" and not scaling:
        return base, {}
    if kind in ("llama3", "yarn"):
        # where the length is not told, transformers takes this for it
        scaling.setdefault("original_max_position_embeddings", theirs["max_position_embeddings"])
    return base, {"rope_type": kind, **scaling}


# --------------------------------------------------------------------------------------------------
# Weights

def their_names(name):
    """
    Their tensors that make up a parameter of ours:
    "blocks.3.mlp.down.weight" -> ["model.layers.3.mlp.down_proj.weight"]
    """
    module, kind = name.rsplit(".", 1)  # kind: weight or bias
    if module in OUTSIDE:
        return [f"{theirs}.{kind}" for theirs in OUTSIDE[module]]
    _, layer, module = module.split(".", 2)
    return [f"model.layers.{layer}.{theirs}.{kind}" for theirs in IN_LAYER[module]]


def convert(tensors, config, where, dtype):
    """Their tensors as {parameter name of ours: tensor}. Raises UserError where they do not fit."""
    # 1. our names and shapes, without memory for them
    with torch.device("meta"):
        own = GSA(GSAConfig.arm("dense", **config | {"block_size": 1}), "torch").state_dict()
    # 2. names
    ignored = {"lm_head.weight"} if config["tie_embed"] else set()  # a copy of the embedding
    found = {name for name in tensors if name not in ignored
             and not name.endswith("rotary_emb.inv_freq")}  # which older versions saved
    needed = {theirs for name in own for theirs in their_names(name)}
    wrong = [f"{name} is missing" for name in sorted(needed - found)]
    wrong += [f"{name} is unknown" for name in sorted(found - needed)]
    refuse(where, wrong)
    # 3. shapes and copies
    weights = {}
    for name, x in own.items():
        parts = [tensors[theirs] for theirs in their_names(name)]
        rows = len(x)
        if name in ("embed.weight", "unembed.weight"):
            rows = config["vocab_size"]
        shape = (rows // len(parts), *x.shape[1:])
        for theirs, part in zip(their_names(name), parts):
            if part.shape != shape or not part.is_floating_point():
                wrong.append(f"{theirs} is {part.dtype} {tuple(part.shape)}, not a float {shape}")
        if not wrong:
            padding = torch.zeros(len(x) - rows, *x.shape[1:], dtype=dtype)
            weights[name] = torch.cat([*(part.to(dtype) for part in parts), padding])
    refuse(where, wrong)
    return weights
