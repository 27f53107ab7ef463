"""
The way of a user who owns weights: a Llama or Qwen checkpoint made with transformers becomes a GSA
model (train.py --init_from=hf:…), and goes back to transformers (model.py --export).
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

import export
import hf
import prepare
import train
from checkpoint import load_checkpoint, load_model
from configurator import UserError
from outdir import read_log
from sample import draw_token, generate

pytestmark = pytest.mark.xdist_group("retrofit")  # one process: the runs are made once
WARMUP = 200  # steps
SHAPE = dict(vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
FAMILIES = {"Llama": {}, "Qwen3": dict(head_dim=16, tie_word_embeddings=True)}
FLAGS = ["--block_size=64", "--n_index_head=4", "--d_index=24", "--k_base=8", "--k_min=4",
         "--k_max=12", "--batch_size=2", f"--index_warmup_iters={WARMUP}", "--warmup_iters=0",
         "--learning_rate=3e-3", "--min_lr=1e-3", "--eval_interval=50", "--eval_iters=2",
         "--log_interval=50",
         "--keep=9", "--device=cpu", "--plot=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    For each family: hf_NAME, random weights with peaked attention; run_NAME, its retrofit of
    WARMUP + 10 steps; back_NAME, the export of that.
    """
    folder = tmp_path_factory.mktemp("retrofit")
    prepare.prepare(prepare.PrepareConfig(dataset="demo", num_tokens=60_000, num_proc=1,
                                          val_fraction=0.2, data_dir=str(folder)))
    for name, settings in FAMILIES.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SHAPE | settings)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter, p in model.named_parameters():
                if "q_norm" in parameter:
                    p.mul_(4)
                elif "embed" in parameter or "q_proj" in parameter or "k_proj" in parameter:
                    p.mul_(20)
        model.save_pretrained(folder / f"hf_{name}")
        train.main([*FLAGS, f"--init_from=auto:hf:{folder}/hf_{name}", f"--data={folder}/demo",
                    f"--out_dir={folder}/run_{name}", f"--max_iters={WARMUP + 10}"])
        export.main([f"--export={folder}/run_{name}", f"--to={folder}/back_{name}"])
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_the_indexer_learns_alone_and_then_everything_trains(folder, name):
    out_dir = str(folder / f"run_{name}")
    _, weights, _ = hf.load(str(folder / f"hf_{name}"))
    # 1. in warm-up recall rises, and all other weights keep their bits
    records = [r for r, _ in read_log(out_dir + "/log.jsonl") if r["step"] <= WARMUP]
    untrained = next(r["recall"] for r in records if r["kind"] == "train")
    recall = [r["recall"] for r in records if r["kind"] == "eval"]
    assert recall == sorted(recall)
    assert recall[-1] > untrained + 0.15
    warm = load_checkpoint(out_dir, str(WARMUP))
    for parameter, x in weights.items():
        assert torch.equal(warm["model"][parameter], x), parameter
    assert all(".indexer." in parameter for parameter in warm["optimizer"])
    # 2. behind it every weight moves
    end = load_checkpoint(out_dir)
    for parameter, x in weights.items():
        assert not torch.equal(end["model"][parameter], x), parameter


# What runs without this project
STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
idx = torch.load(folder + "/idx.pt")
results = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/back_{name}", trust_remote_code=True)
    with torch.no_grad():
        results[name] = (model(idx).logits, model.generate(idx, max_new_tokens=8, do_sample=False))
torch.save(results, folder + "/results.pt")
"""


def test_the_export_gives_the_same_logits_and_tokens_in_transformers(folder):
    torch.manual_seed(1)
    idx = torch.randint(0, 256, (2, 40))
    torch.save(idx, folder / "idx.pt")
    home = str(folder / "home")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= dict(HF_HOME=home, HF_MODULES_CACHE=home + "/modules", HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", STRANGER, str(folder), *FAMILIES], cwd=folder,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "results.pt")
    for name in FAMILIES:
        model, _ = load_model(str(folder / f"run_{name}"))
        logits, tokens = results[name]
        with torch.no_grad():
            torch.testing.assert_close(logits, model(idx).logits, msg=lambda m: f"{name}: {m}")
        ours = generate(model, list(idx), 8, lambda x: draw_token(x, temperature=0))
        for row, expected in zip(tokens, ours):
            assert row[:len(expected)].tolist() == expected.tolist(), name


def test_a_longer_context_with_yarn_starts_from_the_same_weights(folder, tmp_path):
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    train.main([*FLAGS, f"--init_from={folder}/run_Llama", f"--data={folder}/demo",
                f"--out_dir={tmp_path}/long", "--block_size=128", f"--rope_scaling={scaling}",
                "--index_warmup_iters=0", "--max_iters=2"])
    config = load_checkpoint(str(tmp_path / "long"))["model_config"]
    before = load_checkpoint(str(folder / "run_Llama"))["model_config"]
    assert config == before | {"block_size": 128, "rope_scaling": scaling}


@pytest.mark.parametrize("change,message", [
    ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*LlamaForCausalLM"),
    ({"vocab_size": 256}, "embed_tokens.weight|vocabulary"),
])
def test_a_checkpoint_that_cannot_be_used_is_one_line(folder, tmp_path, change, message):
    copy = shutil.copytree(folder / "hf_Llama", tmp_path / "hf")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message) as e:
        train.main([*FLAGS, f"--init_from=hf:{copy}", f"--data={folder}/demo",
                    f"--out_dir={tmp_path}/out"])
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_the_shape_is_that_of_the_weights(folder, tmp_path):
    with pytest.raises(UserError, match="does not fit the settings: n_head 4 → 8"):
        train.main([*FLAGS, f"--init_from=hf:{folder}/hf_Llama", f"--data={folder}/demo",
                    f"--out_dir={tmp_path}/out", "--n_head=8"])
