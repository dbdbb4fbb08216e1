"""Writes trained weights as a Step-3 checkpoint directory, and reads such a directory back.

Never changes the weights beyond rounding those of linear layers to FP8 blocks; the rest stays BF16.

    python examples/nano/export.py --weights build/nano/model --out python/step3rt/data/nano
"""

import argparse
import json
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from fp8_blocks import BLOCK, dequantise, quantise
from model import ModelConfig, Step3
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from train_tokenizer import BOS, EOS

# The tensors that a Step-3 FP8 checkpoint keeps in BF16.
BF16_TENSORS = (
    "embed_tokens.weight",
    "lm_head.weight",
    "norm.weight",
    "layernorm.weight",
    "moe.gate.weight",
)
ASSETS = Path(__file__).parent / "assets"


def checkpoint_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantises all linear layers but router and head, and puts `<name>_scale_inv` beside them."""
    tensors = {}
    for name, weight in weights.items():
        if name.endswith(BF16_TENSORS):
            tensors[name] = weight.to(torch.bfloat16).contiguous()
        else:
            quantised, scale_inv = quantise(weight)
            tensors[name], tensors[f"{name}_scale_inv"] = (
                quantised.contiguous(),
                scale_inv.contiguous(),
            )
    return tensors


def config_json(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """Returns config.json in Step-3's spelling: a singular name, and the MoE layers as a string."""
    return {
        "architectures": ["Step3VLForConditionalGeneration"],
        "model_type": "step3_vl",
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "image_token_id": tokenizer.token_to_id("<im_patch>"),
        "text_config": {
            "architectures": ["Step3TextForCausalLM"],
            "model_type": "step3_text",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_attention_groups": 1,
            "head_dim": config.head_dim,
            "share_q_dim": config.share_q_dim,
            "moe_layers_enum": ",".join(map(str, config.moe_layers)),
            "moe_num_experts": config.moe_num_experts,
            "moe_top_k": config.moe_top_k,
            "moe_intermediate_size": config.moe_intermediate_size,
            "share_expert_dim": config.share_expert_dim,
            "norm_expert_weight": False,
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": config.rms_norm_eps,
            "max_seq_len": config.max_position_embedding,
            "max_position_embedding": config.max_position_embedding,
            "vocab_size": config.vocab_size,
            "torch_dtype": "bfloat16",
        },
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
    }


def write_checkpoint(
    weights: dict[str, Tensor], config: ModelConfig, tokenizer: Path, out: Path
) -> None:
    """Writes model.safetensors, both configurations, the tokenizer and the chat template."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint_tensors(weights), out / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, out / name)
    shutil.copyfile(ASSETS / "chat_template.jinja", out / "chat_template.jinja")
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    generation = {
        "bos_token_id": loaded.token_to_id(BOS),
        "eos_token_id": loaded.token_to_id(EOS),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    (out / "config.json").write_text(json.dumps(config_json(config, loaded), indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def read_checkpoint(directory: Path) -> Step3:
    """Reads an exported directory into a float32 model in evaluation mode."""
    text = json.loads((directory / "config.json").read_text())["text_config"]
    text["moe_layers"] = tuple(int(layer) for layer in text["moe_layers_enum"].split(","))
    model = Step3(ModelConfig(**{f.name: text[f.name] for f in fields(ModelConfig)}))
    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict(
        {
            name: dequantise(tensor, tensors[f"{name}_scale_inv"])
            if tensor.dtype == torch.float8_e4m3fn
            else tensor.float()
            for name, tensor in tensors.items()
            if not name.endswith("_scale_inv")
        }
    )
    return model.eval()


def read_trained(directory: Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """Reads what train.py wrote: the BF16 weights and the sizes they were trained with."""
    sizes = json.loads((directory / "log.jsonl").read_text().splitlines()[0])["model"]
    sizes["moe_layers"] = tuple(sizes["moe_layers"])
    return load_file(directory / "weights.safetensors"), ModelConfig(**sizes)


def main() -> None:
    """Exports the weights of train.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("build/nano/model"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/nano/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path("python/step3rt/data/nano"))
    args = parser.parse_args()
    weights, config = read_trained(args.weights)
    write_checkpoint(weights, config, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
