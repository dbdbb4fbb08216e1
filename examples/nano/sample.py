"""Continues prompts with the exported checkpoint, slowly: without a cache.

Never used for serving; `step3rt generate` is.

    python examples/nano/sample.py "It was a fine morning, and"
"""

import argparse
import sys
from pathlib import Path

import torch
from evaluate import CHECKPOINT
from export import read_checkpoint
from model import Step3
from tokenizers import Tokenizer
from train_tokenizer import EOS


@torch.no_grad()
def sample(
    model: Step3,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    eos: int,
) -> list[int]:
    """Returns up to `max_tokens` sampled ids after the prompt, without the end token."""
    device = next(model.parameters()).device
    ids = list(prompt_ids)
    for _ in range(max_tokens):
        logits, _ = model(torch.tensor([ids], device=device))
        probabilities, order = (
            (logits[0, -1].float() / temperature).softmax(-1).sort(descending=True)
        )
        # The smallest set that reaches top_p: keep a token if those before it have not.
        probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
        token = int(order[torch.multinomial(probabilities, 1)])
        if token == eos:
            break
        ids.append(token)
    return ids[len(prompt_ids) :]


def main() -> None:
    """Samples one continuation of each prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    model = read_checkpoint(args.checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    for prompt in args.prompts:
        torch.manual_seed(args.seed)
        ids = sample(
            model,
            tokenizer.encode(prompt).ids,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            eos=tokenizer.token_to_id(EOS),
        )
        sys.stdout.write(f"{prompt}{tokenizer.decode(ids)}\n\n")


if __name__ == "__main__":
    main()
