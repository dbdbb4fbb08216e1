"""Trains the byte-level BPE tokenizer and writes tokenizer.json and tokenizer_config.json.

Never sees held-out text: the caller passes the training documents.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Step-3 spells these with full-width bars, and the older ones with U+2581 for a space.
_BAR = "\uff5c"
_GAP = "\u2581"
BOS = f"<{_BAR}begin{_GAP}of{_GAP}sentence{_BAR}>"
PAD = f"<{_BAR}{_GAP}pad{_GAP}{_BAR}>"
EOS = "<|EOT|>"
# Ids 0, 1, 2, ... in this order: the first three are those of Step-3, the others share its names.
SPECIAL = (
    BOS,
    f"<{_BAR}end{_GAP}of{_GAP}sentence{_BAR}>",
    PAD,
    "<|BOT|>",
    EOS,
    "<im_patch>",
    "<im_start>",
    "<im_end>",
    "<patch_start>",
    "<patch_end>",
    "<patch_newline>",
    f"<{_BAR}tool_calls_begin{_BAR}>",
    f"<{_BAR}tool_calls_end{_BAR}>",
    f"<{_BAR}tool_call_begin{_BAR}>",
    f"<{_BAR}tool_call_end{_BAR}>",
    f"<{_BAR}tool_sep{_BAR}>",
)
# Single tokens that stay in decoded text, since a reasoning parser looks for them there.
VISIBLE = ("<think>", "</think>")


def train(documents: Iterable[str], vocab_size: int, out: Path) -> Tokenizer:
    """Trains on `documents` up to `vocab_size` tokens, and writes the two files into `out`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, normalized=False) for t in (*SPECIAL, *VISIBLE)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    # The trainer marks every token that it is given as special, and decoding would drop it.
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False) + "\n")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    )
    return Tokenizer.from_file(str(out / "tokenizer.json"))
