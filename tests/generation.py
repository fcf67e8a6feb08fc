"""Compare sampled tokens per second with transformers' generate, in turns: same model, prompts and threads.

    python tests/generation.py --model DIR                 batch 1 and 16, 64 and 256 new tokens, 2 threads, 3 rounds
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Transformer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    ours = Transformer.from_pretrained(args.model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for batch in args.batch:
        for count in args.tokens:
            prompts = torch.randint(1000, 2000, (batch, 32), generator=torch.Generator().manual_seed(0))

            def sample_ours(prompts=prompts, count=count):
                generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
                return sum(len(step) for step in ours.generate(prompts.tolist(), count, 0.7, 0.95, (), generators))

            def sample_theirs(prompts=prompts, count=count):
                made = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_p=0.95,
                                       top_k=0, temperature=0.7, max_new_tokens=count, min_new_tokens=count,
                                       pad_token_id=0)
                return made[:, prompts.shape[1]:].numel()
            rates = {"ours": [], "transformers": []}
            for _ in range(args.rounds):
                for name, job in (("ours", sample_ours), ("transformers", sample_theirs)):
                    began = time.perf_counter()
                    rates[name].append(job() / (time.perf_counter() - began))
            mine, other = (statistics.median(values) for values in rates.values())
            greedy = [step[0] for step in ours.generate(prompts[:1].tolist(), 32, temperature=0)]
            want = theirs.generate(prompts[:1], attention_mask=torch.ones_like(prompts[:1]), do_sample=False,
                                   max_new_tokens=32, min_new_tokens=32, pad_token_id=0)[0, prompts.shape[1]:].tolist()
            print(f"batch {batch:>2}, {count:>3} new tokens: ours {mine:.0f}, transformers {other:.0f} tokens/s, "
                  f"{mine / other:.2f} x; greedy tokens equal: {greedy == want}", flush=True)


if __name__ == "__main__":
    main()
