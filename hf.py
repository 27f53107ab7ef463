"""
Reading Hugging Face checkpoints of the Llama and Qwen families: config.json and safetensors.

    config, weights, metadata = hf.load("meta-llama/Llama-3.2-1B")  # or a folder
    model = GSA(GSAConfig.arm("gsa", **config | {"block_size": 8192}))
    start.open_gates_and_load(model, weights, metadata["folder"])

Their layout is ours: the two halves of a head are rotated in pairs, as in layers.RoPE, and a
projection's matrix is (out, in). Only names differ, gate_proj and up_proj are joined, and the
embedding gets rows up to a multiple of 64.
"""
import os
import re

import torch

from configurator import UserError, mismatch
from model import GSA, GSAConfig
from tokenizer_hf import MAIN_FILE, fetch, read_json
from weights import load_tensors, refuse

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The entries of config.json whose types are checked here (GSAConfig checks the numbers): those that
# must be there, those that may be
NEEDED = {
    "vocab_size": int, "max_position_embeddings": int, "num_hidden_layers": int,
    "num_attention_heads": int, "hidden_size": int, "intermediate_size": int,
}
OPTIONAL = {
    "num_key_value_heads": int, "head_dim": int, "tie_word_embeddings": bool,
    "attention_bias": bool, "mlp_bias": bool, "use_sliding_window": bool, "layer_types": [str],
    "rope_parameters": {}, "rope_scaling": {},
}
# What transformers takes where an entry is absent, if that is not the same as null
ABSENT = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 4096, "num_key_value_heads": 8},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
}
# Entries of published rope_scalings that transformers ignores: Yarn-Llama-2 tells that it was
# finetuned, DeepSeek-R1-0528-Qwen3-8B has an attn_factor, which is not YaRN's attention_factor
IGNORED = ("finetuned", "attn_factor")

# Our module -> theirs; two of theirs are concatenated by rows
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


def load(path_or_id, with_weights=True):
    """
    A checkpoint in a folder, or of the hub (an id like Qwen/Qwen3-0.6B, fetched once). Returns
        the settings of GSAConfig that the model has, as a dict. block_size is the longest context
            that it was made for; a shorter one makes smaller tables;
        {parameter name of ours: tensor}, all that a dense GSA needs, in CPU memory and of the
            dtype in the file (GSA.load_state_dict converts); {} if not with_weights, and then
            nothing large is fetched;
        {"folder": …, "tokenizer": path of tokenizer.json, "" without}.
    Raises UserError, in one line, for what is missing, damaged or not supported.
    """
    folder = find(path_or_id, with_weights)
    path = os.path.join(folder, CONFIG)
    config = read_config(read_json(path), path)
    weights = convert(read_tensors(folder), config, folder) if with_weights else {}
    tokenizer = os.path.join(folder, MAIN_FILE)
    metadata = {
        "folder": folder,
        "tokenizer": tokenizer if os.path.exists(tokenizer) else "",
    }
    return config, weights, metadata


# --------------------------------------------------------------------------------------------------
# Files

def find(path_or_id, with_weights):
    """The folder of a checkpoint; one of the hub is fetched into the hub's cache."""
    path = os.path.expanduser(path_or_id)  # a shell leaves the ~ in hf:~/llama
    if os.path.isdir(path):
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_id):
        raise UserError(f"there is no folder {path}")
    return fetch(path_or_id, f"put its {CONFIG}, *.safetensors and {MAIN_FILE} into a folder, and "
                             "name that", with_weights)


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

def read_config(their_config, path):
    """The settings of GSAConfig that a config.json (a dict) says. Raises UserError."""
    # 1. what is absent
    refuse_damage(path, their_config, {"architectures": [str]})
    architecture = (their_config["architectures"] or ["none"])[0]
    their_config = ABSENT.get(architecture, {}) | their_config
    # From here on, null and absent are the same
    their_config = {key: value for key, value in their_config.items() if value is not None}
    # 2. what is refused
    present = {key: shape for key, shape in OPTIONAL.items() if key in their_config}
    refuse_damage(path, their_config, present)
    wrong = unsupported(their_config, architecture)
    if wrong:
        raise UserError(f"{path}: {wrong} is not supported; it takes one of "
                        f"{', '.join(ABSENT)}, with full attention and unquantized")
    refuse_damage(path, their_config, NEEDED)
    # 3. the settings
    attention_bias = False
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        attention_bias = their_config.get("attention_bias", False)
    rope_base, rope_scaling = read_rope(their_config)
    config = dict(
        vocab_size=their_config["vocab_size"],
        block_size=their_config["max_position_embeddings"],
        n_layer=their_config["num_hidden_layers"],
        n_head=their_config["num_attention_heads"],
        n_kv_head=their_config.get("num_key_value_heads", their_config["num_attention_heads"]),
        n_embd=their_config["hidden_size"],
        d_head=their_config.get("head_dim", 0),
        d_mlp=their_config["intermediate_size"],
        tie_embed=their_config.get("tie_word_embeddings", False),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and their_config.get("mlp_bias", False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        norm_eps=their_config.get("rms_norm_eps", 1e-6),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
    )
    try:
        full = GSAConfig.arm("dense", **config)
    except (ValueError, OverflowError) as e:
        raise UserError(f"{path}: {e}") from None
    # floats, as resumed settings compare types
    numbers = {name: float(config[name]) for name in ("norm_eps", "rope_base")}
    return config | {"d_head": full.d_head} | numbers


def refuse_damage(path, their_config, shape):
    """Raise UserError where a config.json is not of a shape (see configurator.mismatch)."""
    wrong = mismatch(their_config, shape)
    if wrong:
        raise UserError(f"{path} is damaged: {wrong}")


def unsupported(their_config, architecture):
    """What of a config.json our model does not have; "" = nothing."""
    if architecture not in ABSENT:
        return f"architecture {architecture}"
    if their_config.get("hidden_act", "silu") != "silu":
        return f"hidden_act {their_config['hidden_act']!r}"
    if "quantization_config" in their_config:
        return "quantization_config"
    if their_config.get("partial_rotary_factor", 1) != 1:
        return "partial_rotary_factor"
    # Qwen's sliding_window counts only where use_sliding_window is set, Mistral's always
    sliding = their_config.get("use_sliding_window", False)
    if architecture == "MistralForCausalLM":
        sliding = "sliding_window" in their_config
    if sliding or set(their_config.get("layer_types", [])) - {"full_attention"}:
        return "sliding_window"
    return ""


def read_rope(their_config):
    """
    (rope_base, rope_scaling) of a config.json. transformers 5 writes rope_parameters with
    rope_theta in it, transformers 4 wrote rope_theta and rope_scaling, before that with "type".
    """
    given = their_config.get("rope_parameters") or their_config.get("rope_scaling") or {}
    scaling = {key: value for key, value in given.items()
               if value is not None and key not in IGNORED}
    base = scaling.pop("rope_theta", their_config.get("rope_theta", 10000.0))
    kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", kind)
    if scaling.get("partial_rotary_factor") == 1:
        del scaling["partial_rotary_factor"]
    if kind == "default" and not scaling:
        return base, {}
    if kind in ("llama3", "yarn"):
        # where the length is not told, transformers takes this for it
        longest = their_config["max_position_embeddings"]
        scaling.setdefault("original_max_position_embeddings", longest)
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
        return [f"{their_module}.{kind}" for their_module in OUTSIDE[module]]
    _, layer, module = module.split(".", 2)
    return [f"model.layers.{layer}.{their_module}.{kind}" for their_module in IN_LAYER[module]]


def convert(tensors, config, where):
    """Their tensors as {parameter name of ours: tensor}. Raises UserError where they do not fit."""
    # 1. our names and shapes, without memory for them
    with torch.device("meta"):
        own = GSA(GSAConfig.arm("dense", **config | {"block_size": 1}), "torch").state_dict()
    # 2. names
    ignored = {"lm_head.weight"} if config["tie_embed"] else set()  # a copy of the embedding
    found = {name for name in tensors if name not in ignored
             and not name.endswith("rotary_emb.inv_freq")}  # which older versions saved
    needed = {their_name for name in own for their_name in their_names(name)}
    wrong = [f"{name} is missing" for name in sorted(needed - found)]
    wrong += [f"{name} is unknown" for name in sorted(found - needed)]
    refuse(where, wrong)
    # 3. shapes and copies
    weights = {}
    for name, x in own.items():
        parts = [tensors[their_name] for their_name in their_names(name)]
        rows = len(x)
        if name in ("embed.weight", "unembed.weight"):
            rows = config["vocab_size"]
        shape = (rows // len(parts), *x.shape[1:])
        for their_name, part in zip(their_names(name), parts):
            if part.shape != shape or not part.is_floating_point():
                is_there = f"{part.dtype} {tuple(part.shape)}"
                wrong.append(f"{their_name} is {is_there}, not a float {shape}")
        if not wrong:
            padding = parts[0].new_zeros(len(x) - rows, *x.shape[1:])
            weights[name] = torch.cat([*parts, padding])
    refuse(where, wrong)
    return weights
