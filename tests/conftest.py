"""Small models made by transformers, pairs of the demo's population, and a way to run the scripts as a user does."""
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"                 # its threads do not survive a fork
# Hide a GPU from all tests but those of test_cuda.  (Workers of pytest-xdist inherit this setting.)
if not any("test_cuda" in word for word in sys.argv) and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

from bandit import Population  # noqa: E402
from data import BadData  # noqa: E402
from train import write_jsonl  # noqa: E402

LLAMA = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, tie_word_embeddings=False)
GPT2 = dict(n_embd=48, n_layer=2, n_head=4, n_positions=128)
NEOX = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128)


def rope(kind="default", **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=5000.0, **more))


ROPE3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
MODELS = {
    "gpt2": (transformers.GPT2Config, GPT2),
    "gpt2-untied": (transformers.GPT2Config, dict(GPT2, tie_word_embeddings=False, n_inner=60)),
    "neox": (transformers.GPTNeoXConfig, dict(NEOX, **rope(partial_rotary_factor=0.5))),
    "neox-sequential": (transformers.GPTNeoXConfig, dict(NEOX, use_parallel_residual=False, attention_bias=False,
                                                         tie_word_embeddings=True, **rope(partial_rotary_factor=1.0))),
    "llama-grouped": (transformers.LlamaConfig, LLAMA),
    "llama-tied": (transformers.LlamaConfig, dict(LLAMA, tie_word_embeddings=True, head_dim=16)),
    "llama-biased": (transformers.LlamaConfig, dict(LLAMA, attention_bias=True, mlp_bias=True)),
    "llama-rope3": (transformers.LlamaConfig, dict(LLAMA, **ROPE3)),
    "llama-linear": (transformers.LlamaConfig, dict(LLAMA, **rope("linear", factor=4.0))),
    "mistral": (transformers.MistralConfig, dict(LLAMA, sliding_window=None, head_dim=16)),
    "mistral-window": (transformers.MistralConfig, dict(LLAMA, sliding_window=48, tie_word_embeddings=True)),
    "qwen2": (transformers.Qwen2Config, dict(LLAMA, vocab_size=1000)),         # more words than the tokenizer
    "qwen2-window": (transformers.Qwen2Config, dict(LLAMA, use_sliding_window=True, sliding_window=48,
                                                    max_window_layers=1, tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3Config, dict(LLAMA, head_dim=16, tie_word_embeddings=True)),
    "qwen3-window": (transformers.Qwen3Config, dict(
        LLAMA, head_dim=16, use_sliding_window=True, sliding_window=48, attention_bias=True,
        layer_types=["sliding_attention", "full_attention"])),
}


@pytest.fixture(scope="session")
def population():
    return Population()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, population):
    """make_model(name, dtype, shard) -> folder of a random model as transformers writes it, with a tokenizer."""
    made = {}

    def make(name="llama-tied", dtype=torch.float32, shard="5GB"):
        if (name, dtype, shard) not in made:
            files = population.tokenizer_files()
            vocabulary = json.loads(files["tokenizer.json"])["model"]["vocab"]
            kind, settings = MODELS[name]
            end = vocabulary["<end>"]
            config = kind(**{"vocab_size": len(vocabulary), "bos_token_id": end, "eos_token_id": end, **settings})
            torch.manual_seed(1)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():                      # away from the ones and zeros of a fresh model
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            folder = tmp_path_factory.mktemp(name)
            model.to(dtype).save_pretrained(folder, max_shard_size=shard)
            for file, content in files.items():
                (folder / file).write_bytes(content)
            made[name, dtype, shard] = folder
        return made[name, dtype, shard]
    return make


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, population):
    """A file of 50 pairs."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_jsonl(path, population.judgements(50, seed=0))
    return path


def pair_ids(tokenizer, record):
    """What Tokenizer.pairs makes of one record; raises the BadData that it returns."""
    with ThreadPoolExecutor(1) as thread:
        found, = tokenizer.pairs([record], thread)()
    if isinstance(found, BadData):
        raise found
    return found


def forked(script, arguments, cwd, outputs):
    """Fork a process that runs the script's main() as python would, but without importing again -> its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number, file in enumerate(outputs, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))           # noqa: SIM115
        sys.argv = [script, *map(str, arguments)]
        os.chdir(cwd or ".")
        torch.set_num_threads(1)                                    # other threads are lost in a fork
        importlib.import_module(Path(script).stem).main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.fixture(scope="session")
def run():
    """run("train.py", "--flag", ..., processes=1) -> the finished process, its output as text."""
    def call(script, *arguments, processes=1, cwd=None):
        if processes == 1:
            with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
                _, status = os.waitpid(forked(script, arguments, cwd, (out, error)), 0)
                texts = [file.seek(0) or file.read() for file in (out, error)]
            return subprocess.CompletedProcess([script, *arguments], os.waitstatus_to_exitcode(status), *texts)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                   str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=cwd,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    return call
