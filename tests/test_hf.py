"""
Checkpoints of the Llama and Qwen families, made with transformers: in our model they compute what
they compute there. RoPE scaling against transformers' own. Retrofit, and what is refused.
"""
import copy
import json
import math
import os
import random
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import hf
from configurator import UserError, parse
from layers import RoPE, rope_speeds
from model import GSA, GSAConfig, KVCache
from optim import param_groups
from start import open_gates_and_load
from train import TrainConfig

VOCAB = 100
TOLERANCE = 3e-5  # of fp32 logits that are up to 7
SHAPE = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=88, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=96)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CHECKPOINTS = {
    "llama": ("Llama", {}),
    "llama, tied, with biases": ("Llama", dict(tie_word_embeddings=True, attention_bias=True,
                                               mlp_bias=True, rms_norm_eps=1e-3)),
    "llama, wide heads, llama3": ("Llama", dict(head_dim=20, rope_parameters=LLAMA3)),
    "llama, linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "factor": 3.0})),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=6)),
    "qwen2, tied, yarn": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-2)),
    "qwen3, narrow heads, yarn": ("Qwen3", dict(head_dim=6, attention_bias=True,
                                                rope_parameters=YARN)),
}


def make(folder, family, settings, **how):
    """A checkpoint of random weights. Returns transformers' model."""
    torch.manual_seed(0)
    settings = copy.deepcopy(SHAPE | settings)  # transformers adds to rope_parameters
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder, **how)
    return model


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    """(folder, transformers' model, tokens (2, 80), its logits (2, 80, VOCAB))"""
    folder = str(tmp_path_factory.mktemp("hf"))
    theirs = make(folder, *CHECKPOINTS[request.param])
    idx = torch.randint(0, VOCAB, (2, 80))
    with torch.no_grad():
        return folder, theirs, idx, theirs(idx).logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, transformers' model) of one Llama checkpoint; tests change copies of it."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make(folder, "Llama", dict(rope_parameters=YARN))


@pytest.fixture
def folder(tiny, tmp_path):
    """The folder of a copy of `tiny`."""
    return shutil.copytree(tiny[0], tmp_path / "copy")


def edit_json(path, **changes):
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(folder, change):
    """Call change with the dict of a checkpoint's tensors, and save what it left."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def build(folder, arm="dense", **settings):
    """Our model with a folder's weights."""
    config, weights, _ = hf.load(str(folder))
    model = GSA(GSAConfig.arm(arm, **config | settings), "torch").eval()
    assert open_gates_and_load(model, weights, folder) == (arm != "dense")
    return model


def refused(call, words):
    """The call raises UserError in one line that matches the words."""
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def assert_close(name, actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance,
                               msg=lambda text: f"{name}: {text}")


# -----------------------------------------------------------------------------
# Their models in ours

@torch.no_grad()
def test_logits_are_those_of_transformers(checkpoint):
    folder, _, idx, expected = checkpoint
    assert_close("logits", build(folder)(idx).logits, expected, TOLERANCE)


@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_transformers(checkpoint):
    folder, _, idx, expected = checkpoint
    model = build(folder, block_size=80)
    cache = KVCache(2, 80)
    parts = [model(idx[:, :60], cache=cache).logits]
    parts += [model(idx[:, t:t + 1], cache=cache).logits for t in range(60, 80)]
    assert_close("logits", torch.cat(parts, 1), expected, TOLERANCE)


@torch.no_grad()
def test_a_retrofit_starts_as_the_dense_model(checkpoint):
    """
    In warm-up attention is dense, and an open gate is σ(8) = 0.9997: two of them take 0.07 % of
    what a layer's attention adds. Where all keys are selected, the sparse model is the same.
    """
    folder, _, idx, expected = checkpoint
    indexer = dict(n_index_head=2, d_index=8, k_base=80, k_min=80, k_max=80)
    model = build(folder, "gsa", **indexer)
    logits = model(idx, warmup=True).logits
    assert_close("logits", logits, expected, 0.01)
    assert_close("logits of the sparse phase", model(idx).logits, logits, TOLERANCE)
    gated = build(folder, "gated")
    assert_close("logits of the gated arm", gated(idx).logits, logits, TOLERANCE)
    for gate in (gated.blocks[0].attn.value_gate, gated.blocks[0].attn.output_gate):
        gate.proj.bias.fill_(100.0)  # σ(100) = 1 in fp32
    assert (gated(idx).logits - expected).norm() < (logits - expected).norm()


@torch.no_grad()
def test_a_context_longer_than_in_training_is_a_larger_block_size(tiny):
    folder, theirs = tiny
    idx = torch.randint(0, VOCAB, (1, 150))
    short, model = build(folder), build(folder, block_size=150)
    assert short.config.block_size == 96
    assert_close("logits", model(idx).logits, theirs(idx).logits, TOLERANCE)
    short.load_state_dict(model.state_dict())


def test_shards_are_one_checkpoint(tiny, tmp_path):
    folder, theirs = tiny
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    sharded, whole = hf.load(str(tmp_path)), hf.load(str(folder))
    assert sharded[0] == whole[0]
    assert sharded[1].keys() == whole[1].keys()
    for name, x in whole[1].items():
        assert torch.equal(sharded[1][name], x), name


def test_weights_keep_the_dtype_of_the_file_and_become_float32_in_the_model(tiny, tmp_path):
    copy.deepcopy(tiny[1]).bfloat16().save_pretrained(tmp_path)
    half = hf.load(str(tmp_path))[1]
    model = build(tmp_path).state_dict()
    assert half.keys() <= model.keys()
    for name, x in half.items():
        assert x.dtype == torch.bfloat16 and model[name].dtype == torch.float32, name
        assert torch.equal(x.float(), model[name]), name


def test_metadata_names_the_tokenizer_if_there_is_one(folder):
    metadata = hf.load(str(folder))[2]
    assert metadata == dict(folder=str(folder), tokenizer="")
    (folder / "tokenizer.json").write_text("{}")
    assert hf.load(str(folder))[2]["tokenizer"] == str(folder / "tokenizer.json")


def test_a_plan_reads_the_settings_and_fetches_no_weights(folder, monkeypatch):
    import huggingface_hub
    settings = hf.load(str(folder))[0]
    (folder / "model.safetensors").unlink()
    asked = []

    def download(hub_id, allow_patterns):
        asked.append(allow_patterns)
        return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.load("owner/model", with_weights=False) == (
        settings, {}, dict(folder=str(folder), tokenizer=""))
    refused(lambda: hf.load("owner/model"), "holds neither")
    assert asked == [["*config.json", "tokenizer*"],
                     ["*config.json", "tokenizer*", "model*.safetensors*"]]


def test_a_folder_in_the_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert hf.load(f"~/{folder.name}", with_weights=False)[2]["folder"] == str(folder)


def test_an_absent_entry_means_what_it_means_in_transformers(folder):
    """Where null means something else: Mistral's window, KV heads, Qwen3's head width."""
    for family, absent in hf.ABSENT.items():
        theirs = getattr(transformers, family.replace("ForCausalLM", "Config"))
        for name, value in absent.items():
            assert getattr(theirs(), name) == value, (family, name)
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | {"architectures": ["MistralForCausalLM"]}
    assert hf.read_config(settings | {"sliding_window": None}, path)["n_kv_head"] == 2
    refused(lambda: hf.read_config(settings, path), "sliding_window is not supported")
    many = settings | dict(architectures=["Qwen3ForCausalLM"], num_attention_heads=64)
    del many["num_key_value_heads"], many["head_dim"]
    read = hf.read_config(many, path)
    assert read["n_kv_head"] == 32 and read["d_head"] == 128
    null = hf.read_config(many | dict(num_key_value_heads=None), path)
    assert null["n_kv_head"] == 64


def test_entries_of_published_scalings_that_transformers_ignores_are_ignored(folder):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    expected = hf.read_config(settings, path)
    settings["rope_parameters"] |= {"attn_factor": 0.8782488562869419, "finetuned": True}
    assert hf.read_config(settings, path) == expected


def test_what_older_versions_wrote_is_read_too(folder):
    """rope_theta and rope_scaling with "type"; null entries; a buffer among the weights."""
    config, weights, _ = hf.load(str(folder))
    scaling = {key: value for key, value in YARN.items() if key != "rope_type"}
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=5000, head_dim=None,
              rope_scaling={"type": "yarn", "beta_fast": None, **scaling})
    edit_tensors(folder, lambda tensors: tensors.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    older, older_weights, _ = hf.load(str(folder))
    theirs = transformers.LlamaConfig.from_pretrained(folder).rope_parameters
    assert older["rope_scaling"].items() <= theirs.items() and theirs["rope_theta"] == 5000
    assert older == config | {"rope_base": 5000.0} and older["d_head"] == 8
    assert type(older["rope_base"]) is float
    assert older_weights.keys() == weights.keys()


def test_a_length_that_yarn_does_not_tell_is_that_of_transformers(folder):
    edit_json(folder / "config.json",
              rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4})
    scaling = hf.load(str(folder))[0]["rope_scaling"]
    theirs = transformers.LlamaConfig.from_pretrained(folder).rope_parameters
    assert scaling == {key: value for key, value in theirs.items() if key != "rope_theta"}


# -----------------------------------------------------------------------------
# What is refused

BAD_CONFIGS = {
    "another architecture": (dict(architectures=["GPT2LMHeadModel"], hidden_size=None),
                             "architecture GPT2LMHeadModel .*LlamaForCausalLM, Mistral.*, Qwen2"),
    "no architecture": (dict(architectures=[]), "architecture none"),
    "a quantized model": (dict(quantization_config={"bits": 4}), "quantization_config"),
    "another activation": (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    "a sliding window": (dict(use_sliding_window=True), "sliding_window"),
    "a window by layers": (dict(layer_types=["sliding_attention"]), "sliding_window"),
    "Mistral's window": (dict(architectures=["MistralForCausalLM"], sliding_window=64),
                         "sliding_window"),
    "part of a head rotated": (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "another scaling": (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
                        "rope_type 'dynamic' is not one of default, linear, llama3, yarn"),
    "a scaling of a wrong type": (dict(rope_parameters={"rope_type": []}), r"rope_type \[\]"),
    "no size": (dict(hidden_size=None), "lacks 'hidden_size'"),
    "a size in words": (dict(hidden_size="48"), "hidden_size is not of type int"),
    "a size of zero": (dict(vocab_size=0), "vocab_size is 0"),
    "an odd head": (dict(head_dim=7), "head width 7 is odd"),
    "a base in words": (dict(rope_parameters={"rope_theta": "big"}), "rope_base is 'big'"),
    "a huge base": (dict(rope_parameters={"rope_theta": 10 ** 400}), "config.json"),
    "a flag in words": (dict(attention_bias="yes"), "attention_bias is not of type bool"),
    "another width": (dict(intermediate_size=80),
                      r"mlp.gate_proj.weight is .* \(88, 48\), not a float \(80, 48\)"),
    "another vocabulary": (dict(vocab_size=90), r"embed_tokens.* not a float \(90, 48\)"),
    "more layers": (dict(num_hidden_layers=4),
                    "layers.3.input_layernorm.weight is missing, .* and 6 more"),
    "fewer layers": (dict(num_hidden_layers=2), "layers.2.* is unknown"),
    "another family": (dict(architectures=["Qwen2ForCausalLM"]), "k_proj.bias is missing"),
    "tied": (dict(tie_word_embeddings=True), None),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_does_not_fit_is_refused(folder, name):
    changes, words = BAD_CONFIGS[name]
    edit_json(folder / "config.json", **changes)
    if words is None:  # transformers ignores the output projection then, and so do we
        assert "unembed.weight" not in hf.load(str(folder))[1]
        return
    refused(lambda: hf.load(str(folder)), words)


def as_integers(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


BAD_FILES = {
    "no config": (lambda folder: (folder / "config.json").unlink(),
                  "config.json cannot be read: No such file"),
    "a config that is cut off": (lambda folder: (folder / "config.json").write_text('{"a": '),
                                 "config.json is damaged: it is not JSON"),
    "a config of noise": (lambda folder: (folder / "config.json").write_bytes(b"\xff\x00"),
                          "config.json is damaged"),
    "a list as config": (lambda folder: (folder / "config.json").write_text("[]"),
                         "config.json is damaged: it is not a dict"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(),
                   "holds neither model.safetensors nor model.safetensors.index.json"),
    "weights that are cut off": (lambda folder: os.truncate(folder / "model.safetensors", 5000),
                                 "model.safetensors is not a readable safetensors file"),
    "a tensor too few": (lambda folder: edit_tensors(
        folder, lambda tensors: tensors.pop("model.norm.weight")), "model.norm.weight is missing"),
    "a tensor too many": (lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update(other=torch.ones(2))), "other is unknown"),
    "integers": (lambda folder: edit_tensors(folder, as_integers), "model.norm.weight is torch"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_missing_or_damaged_file_is_refused(folder, name):
    damage, words = BAD_FILES[name]
    damage(folder)
    refused(lambda: hf.load(str(folder)), words)


@pytest.mark.parametrize("shard, words", [
    ("model-2.safetensors", "model-2.safetensors cannot be read"),
    ("../model.safetensors", "names a file in another folder"),
])
def test_a_missing_shard_is_refused(folder, shard, words):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: hf.load(str(folder)), words)


def test_a_model_that_cannot_be_fetched_says_which_files_to_put_where(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(lambda: hf.load("no-such-owner/no-such-model"),
            "cannot be fetched .*config.json, .*safetensors and tokenizer.json into a folder")
    for path in ("/no/such/folder", "./folder", "folder", ""):
        refused(lambda: hf.load(path), "there is no folder")


def test_weights_that_do_not_fit_leave_the_model_unchanged(tiny):
    config, weights, _ = hf.load(str(tiny[0]))
    small = dict(n_index_head=2, d_index=8)
    wrong = {
        r"folder does not fit the model: norm.weight is missing": {"norm.weight": None},
        r"other has no place in it": {"other": torch.ones(1)},
        r"norm.weight is \(7,\), not \(48,\)": {"norm.weight": torch.ones(7)},
        r"that are not finite \(norm.weight\)": {"norm.weight": torch.full((48,), torch.nan)},
    }
    model = GSA(GSAConfig.arm("gsa", **config | small))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for words, change in wrong.items():
        bad = {name: x for name, x in {**weights, **change}.items() if x is not None}
        refused(lambda: open_gates_and_load(model, bad, "folder"), words)
        for name, x in model.state_dict().items():
            assert torch.equal(x, before[name]), name


# -----------------------------------------------------------------------------
# RoPE scaling

def random_scaling(kind, rng):
    """A rope_scaling with random entries; those that may be missing sometimes are."""
    scaling = {"rope_type": kind, "factor": rng.uniform(1, 40)}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = rng.choice([16, 100, 2048, 8192, 32768])
    if kind == "llama3":
        scaling["low_freq_factor"] = rng.uniform(0.5, 2)
        scaling["high_freq_factor"] = rng.uniform(2.1, 8)
    if kind == "yarn":
        optional = dict(beta_fast=rng.uniform(8, 64), beta_slow=rng.uniform(0.1, 4),
                        truncate=rng.random() < 0.5, attention_factor=rng.uniform(0.5, 2))
        for name, value in optional.items():
            if rng.random() < 0.5:
                scaling[name] = value
        if rng.random() < 0.2:
            scaling |= dict(beta_fast=3.0, beta_slow=3.0)
        if rng.random() < 0.5:
            scaling |= dict(mscale=rng.uniform(0.5, 2), mscale_all_dim=rng.uniform(0.5, 2))
    return scaling


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaled_speeds_and_attention_factor_are_those_of_transformers(kind):
    rng = random.Random(kind)
    for _ in range(60):
        scaling = random_scaling(kind, rng)
        width, base = rng.choice([2, 6, 16, 64, 128]), rng.choice([20.0, 1e4, 5e5])
        config = transformers.LlamaConfig(
            head_dim=width, max_position_embeddings=1 << 20,
            rope_parameters={**scaling, "rope_theta": base})
        speed, factor = ROPE_INIT_FUNCTIONS[kind](config)
        ours, our_factor = rope_speeds(width, base, scaling)
        torch.testing.assert_close(ours.float(), speed, rtol=1e-5, atol=0,
                                   msg=lambda text: f"{width} {base} {scaling}: {text}")
        assert our_factor == pytest.approx(factor, rel=1e-12), scaling


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rotary_tables_are_those_of_transformers(kind):
    rng = random.Random(kind)
    scaling = {"rope_type": kind} if kind == "default" else random_scaling(kind, rng)
    config = transformers.LlamaConfig(head_dim=32, max_position_embeddings=1 << 20,
                                      rope_parameters={**scaling, "rope_theta": 1e4})
    cos, sin = LlamaRotaryEmbedding(config)(torch.ones(1), torch.arange(500)[None])
    rope = RoPE(500, 32, 1e4, scaling)
    # transformers computes angles in fp32: one of 500 has an error of up to 3e-5
    assert_close("cos", rope.cos[:, 0], cos[0, :, :16], 1e-4)
    assert_close("sin", rope.sin[:, 0], sin[0, :, :16], 1e-4)


def test_yarn_by_hand():
    """
    Base 16, width 8: speeds 1, 1/2, 1/4, 1/8. Trained at L = 64: the pairs turn 10.2, 5.1, 2.5 and
    1.3 times. beta_fast = 10.19 lies at pair 0, beta_slow = 1.27 at pair 3. Between them 1/3 and
    2/3 of a speed are divided by 4. The factor is 0.1·ln 4 + 1.
    """
    turns = 64 / (2 * math.pi)
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64,
                   beta_fast=turns, beta_slow=turns / 8, truncate=False)
    speed, factor = rope_speeds(8, 16.0, scaling)
    expected = [1, 1 / 2 * (2 / 3 + 1 / 3 / 4), 1 / 4 * (1 / 3 + 2 / 3 / 4), 1 / 8 / 4]
    assert speed.tolist() == pytest.approx(expected, rel=1e-12)
    assert factor == pytest.approx(1.13863, abs=1e-5)


def test_scaled_tables_are_exact_at_position_131071():
    scaling = dict(rope_type="yarn", factor=32.0, original_max_position_embeddings=4096)
    speed, factor = rope_speeds(8, 1e4, scaling)
    rope = RoPE(131072, 8, 1e4, scaling)
    for i, radians in enumerate(speed.tolist()):
        exact = factor * math.cos(131071 * radians)
        assert abs(rope.cos[-1, 0, i].item() - exact) < 2 ** -23, f"pair {i}"


def test_the_indexer_has_the_scaled_speeds_and_no_attention_factor():
    config = GSAConfig.arm("gsa", n_layer=2, n_head=4, n_embd=64, n_index_head=2, d_index=16,
                           block_size=64, rope_scaling=YARN)
    attn = GSA(config).blocks[1].attn
    speed, factor = rope_speeds(16, config.rope_base, YARN)  # both widths are 16
    assert factor > 1.1
    angle = torch.arange(64)[:, None] * speed  # (64, 8)
    assert_close("indexer", attn.indexer.rope.cos[:, 0], angle.cos().float(), 1e-6)
    assert_close("attention", attn.rope.cos[:, 0], (factor * angle.cos()).float(), 1e-6)


BAD_SCALINGS = {
    "no type": (dict(factor=2.0), "rope_type None is not one of default, linear, llama3, yarn"),
    "another type": (dict(rope_type="longrope"), "rope_type 'longrope'"),
    "no length": (dict(rope_type="yarn", factor=2.0), "lacks 'original_max_position_embeddings'"),
    "an unknown entry": (dict(rope_type="linear", factor=2.0, beta=3), "no entry 'beta'"),
    "a factor below 1": (dict(rope_type="linear", factor=0.5), "factor is 0.5"),
    "a factor of NaN": (dict(rope_type="linear", factor=math.nan), "factor is nan"),
    "a factor in words": (YARN | dict(factor="4"), "factor is '4'"),
    "truncate as a number": (YARN | dict(truncate=1), "truncate is 1"),
    "fast below slow": (YARN | dict(beta_fast=2, beta_slow=3), "beta_slow is above beta_fast"),
    "low above high": (LLAMA3 | dict(low_freq_factor=4.0), "low_freq_factor is not below"),
    "a text": ("yarn", "must be a dict"),
}


@pytest.mark.parametrize("name", BAD_SCALINGS)
def test_an_impossible_scaling_is_refused(name):
    scaling, words = BAD_SCALINGS[name]
    with pytest.raises(ValueError, match="rope_scaling.*" + words) as error:
        GSAConfig(rope_scaling=scaling)
    assert "\n" not in str(error.value)


def test_yarn_needs_a_base_above_one():
    with pytest.raises(ValueError, match="rope_base above 1"):
        GSAConfig(rope_scaling=YARN, rope_base=1)


def test_rope_scaling_is_a_setting_of_scripts(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(f"rope_scaling = {YARN}\n")
    for argv in ([str(path)], [f"--rope_scaling={YARN}"], ["--rope_scaling", json.dumps(YARN)]):
        assert parse(TrainConfig, argv) == dict(rope_scaling=YARN)
    assert TrainConfig(rope_scaling=YARN).model_config(5).rope_scaling == YARN
    refused(lambda: parse(TrainConfig, ["--rope_scaling=yarn"]), "rope_scaling must be of type")
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"])
    assert "--rope_scaling={}" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# The new parts of the model

EVERYTHING = dict(vocab_size=37, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                  n_index_head=2, d_index=8, k_base=8, k_min=4, k_max=12, d_head=12, d_mlp=50,
                  tie_embed=False, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True,
                  norm_eps=1e-4, rope_scaling=YARN)


def test_every_parameter_is_in_one_group_and_biases_start_at_zero():
    model = GSA(GSAConfig.arm("gsa", **EVERYTHING))
    groups = {group["name"]: group["params"] for group in param_groups(model)}
    grouped = [id(p) for params in groups.values() for p in params]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in groups["embed"]} == {id(model.embed.weight), id(model.unembed.weight)}
    for name, p in model.named_parameters():
        if name.endswith(("wq.bias", "wk.bias", "wv.bias", "wo.bias", "gate_up.bias", "down.bias")):
            assert ".indexer." in name or (p == 0).all(), name
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            assert (p == 1).all(), name


def test_the_pytorch_path_equals_the_eager_one_with_every_part():
    config = GSAConfig.arm("gsa", **EVERYTHING)
    eager, tiled = GSA(config, "eager").double(), GSA(config, "torch").double()
    with torch.no_grad():
        for p in eager.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    tiled.load_state_dict(eager.state_dict())
    idx = torch.randint(0, 37, (2, 64))
    grads = []
    for model in (eager, tiled):
        out = model(idx, idx)
        (out.loss + out.index_loss).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert_close(name, grads[1][name], grad, 1e-10)
