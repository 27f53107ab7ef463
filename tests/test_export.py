"""export.py and modeling_gsa.py: the exported folder, loaded without this project's files."""
import ast
import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
import prepare
import train
from attention import document_starts
from checkpoint import load_model
from configurator import UserError
from conftest import ROOT
from model import ARMS
from sample import draw_token, generate

pytestmark = pytest.mark.xdist_group("export")  # one process: the exports are made once
SEPARATOR = 256  # of the byte tokenizer
NEW_TOKENS = 16
# One of the arms reads across documents, as a run without doc_mask does
DOC_MASK = {"dense": True, "gated": False, "sparse": True, "gsa": True}
SETTINGS = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=48, n_index_head=2,
                d_index=8, k_base=8, k_min=4, k_max=12, batch_size=2, max_iters=1, warmup_iters=0,
                index_warmup_iters=0, learning_rate=0.02, eval_iters=1, device="cpu")

# What runs without this project: argv[1] is the folder with the models and inputs.pt
STRANGER = '''
import sys
import torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
given = torch.load(folder + "/inputs.pt")
results = {}
for arm in given["arms"]:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/hf_{arm}", trust_remote_code=True)
    out = results[arm] = {}
    generate = lambda **how: model.generate(max_new_tokens=given["n"], do_sample=False, **how)
    padded = dict(input_ids=given["padded"], attention_mask=given["mask"])
    with torch.no_grad():
        out["logits"] = model(given["whole"]).logits
        out["loss"] = model(given["whole"], labels=given["whole"]).loss
        out["padded logits"] = model(**padded).logits
        flipped = {name: x.flip(1) for name, x in padded.items()}
        out["right padding"] = model(**flipped).logits
    out["generated"] = generate(**padded)
    out["generated without cache"] = generate(**padded, use_cache=False)
    out["alone"] = generate(input_ids=given["whole"][:1])
    out["beams"] = generate(**padded, num_beams=3)
    out["beams without cache"] = generate(**padded, num_beams=3, use_cache=False)
    model.save_pretrained(f"{folder}/again_{arm}")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/again_{arm}", trust_remote_code=True)
    out["saved again"] = again(given["whole"]).logits.detach()
    again.config.eos_token_id = [5, 256]  # as people do to stop generate() at the end of a turn
    out["several ends"] = again(given["whole"]).logits.detach()
    try:
        generate(input_ids=given["padded"].flip(1), attention_mask=given["mask"].flip(1))
    except ValueError as e:
        out["refusal"] = str(e)
results["ours"] = [m for m in ("model", "attention", "layers", "checkpoint") if m in sys.modules]
torch.save(results, folder + "/results.pt")
'''


def text_tokens(lengths, separators=()):
    """Rows of random bytes that begin with a separator, and have one at each of the places."""
    rows = [torch.randint(0, 256, (n,)) for n in lengths]
    for row in rows:
        row[[0, *[i for i in separators if i < len(row)]]] = SEPARATOR
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four runs of one step, run_ARM, and their exports, hf_ARM."""
    folder = tmp_path_factory.mktemp("export")
    lines = [json.dumps({"text": f"Document {i} says {i * i} and no more. " * 9}) for i in range(9)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare.prepare(prepare.PrepareConfig(dataset=str(folder / "text.jsonl"), tokenizer="bytes",
                                          num_proc=1, val_fraction=0.3, data_dir=str(folder)))
    for arm in ARMS:
        train.train(train.TrainConfig.arm(arm, **SETTINGS, attention=arm, doc_mask=DOC_MASK[arm],
                                          data=str(folder / "text"),
                                          out_dir=str(folder / f"run_{arm}")))
        export.export(export.ExportConfig(str(folder / f"run_{arm}"), str(folder / f"hf_{arm}")))
    return folder


@pytest.fixture(scope="module")
def exchange(folder):
    """(inputs, what transformers computes from them), see STRANGER."""
    torch.manual_seed(0)
    prompts = text_tokens([5, 21, 12], separators=[8])
    longest = max(map(len, prompts))
    padded = torch.full((len(prompts), longest), SEPARATOR)
    mask = torch.zeros_like(padded)
    for i, prompt in enumerate(prompts):
        padded[i, longest - len(prompt):] = prompt
        mask[i, longest - len(prompt):] = 1
    inputs = dict(arms=list(ARMS), n=NEW_TOKENS, prompts=prompts, padded=padded, mask=mask,
                  whole=torch.stack(text_tokens([30, 30], separators=[11, 12])))
    torch.save(inputs, folder / "inputs.pt")
    home = str(folder / "home")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_CACHE")}
    environment |= dict(HF_HOME=home, HF_MODULES_CACHE=home + "/modules", HF_HUB_OFFLINE="1",
                        OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", STRANGER, str(folder)], cwd=folder,
                          env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return inputs, torch.load(folder / "results.pt")


def expected_logits(folder, arm, rows):
    model, _ = load_model(str(folder / f"run_{arm}"))
    with torch.no_grad():
        return [model(row[None], doc_start=starts(arm, row)).logits[0] for row in rows]


def starts(arm, row):
    return document_starts(row[None], SEPARATOR) if DOC_MASK[arm] else None


@pytest.mark.parametrize("arm", ARMS)
def test_transformers_computes_the_same_logits_and_loss(folder, exchange, arm):
    inputs, results = exchange
    whole = inputs["whole"]
    expected = torch.stack(expected_logits(folder, arm, whole))
    torch.testing.assert_close(results[arm]["logits"], expected)
    torch.testing.assert_close(results[arm]["saved again"], expected)
    torch.testing.assert_close(results[arm]["several ends"], expected)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), whole[:, 1:].flatten())
    torch.testing.assert_close(results[arm]["loss"], loss)


@pytest.mark.parametrize("arm", ARMS)
def test_padding_on_either_side_changes_no_logits_of_the_text(folder, exchange, arm):
    inputs, results = exchange
    for i, expected in enumerate(expected_logits(folder, arm, inputs["prompts"])):
        torch.testing.assert_close(results[arm]["padded logits"][i, -len(expected):], expected)
    flipped = [prompt.flip(0) for prompt in inputs["prompts"]]
    for i, expected in enumerate(expected_logits(folder, arm, flipped)):
        torch.testing.assert_close(results[arm]["right padding"][i, :len(expected)], expected)


@pytest.mark.parametrize("arm", ARMS)
def test_generate_gives_the_tokens_of_sample_py_with_and_without_cache(folder, exchange, arm):
    inputs, results = exchange
    model, _ = load_model(str(folder / f"run_{arm}"))
    greedy = functools.partial(draw_token, temperature=0)
    separator = SEPARATOR if DOC_MASK[arm] else None
    begin = inputs["padded"].size(1)
    rows = generate(model, inputs["prompts"], NEW_TOKENS, greedy, separator)
    assert len({tuple(row[-NEW_TOKENS:].tolist()) for row in rows}) > 1
    for i, (prompt, row) in enumerate(zip(inputs["prompts"], rows)):
        new = row[len(prompt):]
        for name in ("generated", "generated without cache"):
            assert torch.equal(results[arm][name][i, begin:][:len(new)], new), name
    alone = generate(model, inputs["whole"][:1], NEW_TOKENS, greedy, separator)[0]
    assert torch.equal(results[arm]["alone"][0, :len(alone)], alone)


@pytest.mark.parametrize("arm", ARMS)
def test_beam_search_reorders_the_cache(exchange, arm):
    results = exchange[1][arm]
    assert torch.equal(results["beams"], results["beams without cache"])


def test_generate_refuses_padding_on_the_right(exchange):
    for arm in ARMS:
        assert "pad prompts on the left" in exchange[1][arm]["refusal"]


def test_the_exported_code_needs_nothing_of_this_project(folder, exchange):
    """No absolute import of a module of ours, and no script, in any exported file."""
    assert exchange[1]["ours"] == []
    files = {path.stem: path.read_text() for path in (folder / "hf_gsa").glob("*.py")}
    assert {"modeling_gsa", "model", "attention", "kernels"} <= set(files)
    assert not {"configurator", "checkpoint", "export", "train"} & set(files)
    for name, source in files.items():
        assert "__main__" not in source
        for node in ast.walk(ast.parse(source)):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported = [node.module]
            for module in imported:
                assert not (Path(ROOT) / f"{module}.py").exists(), f"{name} imports {module}"


@pytest.mark.parametrize("line,expected", [
    ("import kernels", "from . import kernels"),
    ("from checks import check_index, BACKENDS", "from .checks import check_index, BACKENDS"),
    ("def f():\n    from checks import x", "def f():\n    from .checks import x"),
    ("from torch import Tensor", "from torch import Tensor"),
    ("import math", "import math"),
    ('x = 1\nif __name__ == "__main__":\n    import train', "x = 1"),
])
def test_only_imports_of_our_own_modules_become_relative(line, expected):
    assert export.as_package(line)[0] == expected + "\n"


def test_a_tokenizer_json_travels_along_and_others_are_described(folder, tmp_path):
    run = str(folder / "run_dense")
    assert "list(text.encode())" in (folder / "hf_dense" / "README.md").read_text()
    model, checkpoint = load_model(run)
    (tmp_path / "tokenizer.json").write_text("{}")
    for i, name in enumerate((str(tmp_path), f"hf:{tmp_path}/tokenizer.json")):
        checkpoint["meta"]["tokenizer"] = name
        out = tmp_path / str(i)
        out.mkdir()
        export.write_model(str(out), "out", model, checkpoint)
        assert (out / "tokenizer.json").read_text() == "{}"
        assert json.loads((out / "tokenizer_config.json").read_text())
        assert "AutoTokenizer.from_pretrained(\"out\"" in (out / "README.md").read_text()


def test_a_tokenizer_of_the_hub_is_fetched_or_named(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants
    model, checkpoint = load_model(str(folder / "run_dense"))
    checkpoint["meta"]["tokenizer"] = "hf:meta-llama/Llama-3.2-1B"
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def written(place):
        out = tmp_path / place
        out.mkdir()
        export.write_model(str(out), place, model, checkpoint)
        return (out / "README.md").read_text()
    # 1. there is no network, or the folder has moved
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert 'AutoTokenizer.from_pretrained("meta-llama/Llama-3.2-1B"' in written("named")
    assert not (tmp_path / "named" / "tokenizer.json").exists()
    checkpoint["meta"]["tokenizer"] = "hf:/moved/Llama"
    assert 'AutoTokenizer.from_pretrained("/moved/Llama"' in written("moved")
    # 2. it is fetched
    checkpoint["meta"]["tokenizer"] = "hf:meta-llama/Llama-3.2-1B"
    (snapshot / "tokenizer.json").write_text('{"a": 1}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    assert 'AutoTokenizer.from_pretrained("fetched"' in written("fetched")
    assert (tmp_path / "fetched" / "tokenizer.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize("name,words", [
    ("gpt2", 'tiktoken.get_encoding("gpt2")'), ("llama3:/a/b", "ranks of the file `llama3:/a/b`"),
    ("tiktoken:/a", "ranks of the file `tiktoken:/a`"), ("bytes", "list(text.encode())"),
    ("hf:owner/model", 'AutoTokenizer.from_pretrained("owner/model"')])
def test_the_readme_says_how_text_becomes_tokens(name, words):
    assert words in export.how_to_tokenize(name, copied=False, folder="out")


def test_the_command_refuses_in_one_line_and_loses_nothing(folder, tmp_path, monkeypatch):
    run = str(folder / "run_dense")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("precious")
    for argv, message in ((["--export", str(tmp_path), "--to", str(tmp_path / "a")], "checkpoint"),
                          (["--export", run, "--to", str(kept)], "not an empty folder"),
                          (["--export", run], "--to=hf_out")):
        with pytest.raises(UserError, match=message):
            export.main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_text() == "precious"
    (kept / "file").unlink()
    monkeypatch.setattr(sys, "argv", ["model.py", "--export", run, "--to", str(kept)])
    runpy.run_path(os.path.join(ROOT, "model.py"), run_name="__main__")
    assert (kept / "model.safetensors").exists()


def test_an_export_that_fails_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space")
    monkeypatch.setattr(export, "save_tensors", full)
    with pytest.raises(OSError):
        export.export(export.ExportConfig(str(folder / "run_dense"), str(tmp_path / "new")))
    assert not list(tmp_path.iterdir())
