"""Decodes 200 streams at once on a local cluster of 2 attention and 2 FFN processes.

python examples/two_hundred_streams.py
"""

import sys
import time

from step3rt import LLM, SamplingParams

NUM_STREAMS = 200
NUM_TOKENS = 32


def main() -> None:
    """Prints streams, tokens, seconds and tokens per second."""
    prompts = [f"It was a fine morning, and {number} men" for number in range(NUM_STREAMS)]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM("nano", attention=2, ffn=2) as llm:
        begun_s = time.perf_counter()
        outputs = llm.generate(prompts, params)
        elapsed_s = time.perf_counter() - begun_s
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    sys.stdout.write(
        f"{len(outputs)} streams, {num_tokens} tokens, {elapsed_s:.1f} s, "
        f"{num_tokens / elapsed_s:.0f} tokens/s\n"
    )


if __name__ == "__main__":
    main()
