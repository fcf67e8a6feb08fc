"""From a file to tokenised pairs: time and memory, compared with TRL's, in processes that take turns.

    python tests/reading.py --model DIR --data pairs.jsonl --peer TRL_VENV/bin/python

The pairs of --data (strings: prompt, chosen, rejected) are repeated, with different suffixes, up to --pairs.
They are read as strings and as chats, in which Anthropic's "Human:" and "Assistant:" become messages.
`again` is a second start of ours, which takes the pairs from its cache.
"""
import argparse
import gzip
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(file: str, model: str, cache: str) -> dict:
    sys.path.insert(0, str(ROOT))
    import train
    tokenizer = train.Tokenizer(model)                              # as for TRL: before time and memory count
    began, idle = time.perf_counter(), peak_mb()
    pairs = train.cached_pairs(Path(cache), lambda path, save: save(path), (file,), tokenizer, 1024,
                               0.1, False, True, (), None, iter).pairs
    return {"seconds": time.perf_counter() - began, "mb": peak_mb() - idle, "pairs": len(pairs)}


def trl(file: str, model: str) -> dict:
    import datasets
    import transformers
    from trl import DPOTrainer
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    settings = types.SimpleNamespace(dataset_num_proc=None, max_length=1024, truncation_mode="keep_start")
    datasets.disable_progress_bars()
    began, idle = time.perf_counter(), peak_mb()
    with tempfile.TemporaryDirectory() as cache:
        data = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
        stand_in = types.SimpleNamespace(_tokenizer=tokenizer)
        made = DPOTrainer._prepare_dataset(stand_in, data, tokenizer, settings, "train")
        return {"seconds": time.perf_counter() - began, "mb": peak_mb() - idle, "pairs": len(made)}


def write_files(args, work: str) -> dict[str, str]:
    with (gzip.open if args.data.endswith(".gz") else open)(args.data, "rt") as lines:
        records = [json.loads(line) for line in lines]
    files = {kind: str(Path(work) / f"{kind}.jsonl") for kind in ("strings", "chats")}
    with open(files["strings"], "w") as strings, open(files["chats"], "w") as chats:
        for i in range(args.pairs):
            record = records[i % len(records)]
            record = {key: record[key] for key in ("prompt", "chosen", "rejected")}
            if i >= len(records):
                record |= {"chosen": f"{record['chosen']} ({i})", "rejected": f"{record['rejected']} ({i})"}
            strings.write(json.dumps(record) + "\n")
            parts = re.split(r"\n\n(Human|Assistant): ?", record["prompt"].removesuffix("\n\nAssistant:"))[1:]
            prompt = [{"role": "user" if who == "Human" else "assistant", "content": said.strip() or "."}
                      for who, said in zip(parts[::2], parts[1::2])]
            answers = {key: [{"role": "assistant", "content": record[key].strip() + "."}]
                       for key in ("chosen", "rejected")}
            chats.write(json.dumps({"prompt": prompt, **answers}) + "\n")
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with tokenizer and chat template")
    parser.add_argument("--data", help="JSON Lines, plain or .gz")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="a Python that has trl")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job, *words = json.loads(args.job)
        print(json.dumps({"ours": ours, "again": ours, "trl": trl}[job](*words)))
        return
    with tempfile.TemporaryDirectory() as work:
        for kind, file in write_files(args, work).items():
            cache, found = str(Path(work) / f"{kind}.safetensors"), {}
            jobs = dict.fromkeys(("ours", "again"), (sys.executable, [file, args.model, cache]))
            if args.peer:
                jobs["trl"] = args.peer, [file, args.model]
            for _ in range(args.rounds):
                Path(cache).unlink(missing_ok=True)
                for name, (python, words) in jobs.items():
                    done = subprocess.run([python, __file__, "--job", json.dumps([name, *words])], capture_output=True,
                                          text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
                    if done.returncode:
                        sys.exit(f"{name}: {done.stderr[-2000:]}")
                    found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
            for name, rows in found.items():
                seconds = statistics.median(row["seconds"] for row in rows)
                memory, pairs = statistics.median(row["mb"] for row in rows), rows[0]["pairs"]
                print(f"{kind:<8} {name:<6} {pairs:,} pairs, {seconds:.2f} s, {pairs / seconds:,.0f} pairs/s, "
                      f"peak {memory:,.0f} MB above idle", flush=True)


if __name__ == "__main__":
    main()
