"""Text and configurations for the tests of whole decoders, on a GPU and on the CPU."""

import json
from functools import cache
from pathlib import Path

import step3rt
from step3rt.model.config import Step3Config

NANO = Path(step3rt.__path__[0]) / "data" / "nano"
HELDOUT = Path(__file__).parents[2] / "examples" / "nano" / "heldout.jsonl"
WINDOW_TOKENS = 1024
NUM_WINDOWS = 6


@cache
def windows() -> list[list[int]]:
    """Held-out text of nano, tokenised; each window is read from its own start."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    found = []
    for line in HELDOUT.read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["text"]).ids
        if len(ids) > WINDOW_TOKENS:
            found.append(ids[: WINDOW_TOKENS + 1])
    return found[:NUM_WINDOWS]


def step3_slice(expert_size: int, num_heads: int = 64, dense_size: int = 18432) -> Step3Config:
    """Step-3's widths, in a dense layer and one of experts; a vocabulary that fits a test."""
    text = {
        "hidden_size": 7168,
        "intermediate_size": dense_size,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_attention_groups": 1,
        "head_dim": 256,
        "share_q_dim": 2048,
        "moe_layers_enum": "1",
        "moe_num_experts": 48,
        "moe_top_k": 3,
        "moe_intermediate_size": expert_size,
        "share_expert_dim": expert_size,
        "vocab_size": 1024,
        "max_seq_len": 4096,
    }
    top = {"model_type": "step3_text", "bos_token_id": 0, "eos_token_id": 1, **text}
    top["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return Step3Config.from_json(top, Path("config.json"))
