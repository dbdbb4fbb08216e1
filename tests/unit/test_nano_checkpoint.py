"""The nano checkpoint is a Step-3 checkpoint in every respect but size, and its recipe is sound."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
NANO = ROOT / "python/step3rt/data/nano"
RECIPE = ROOT / "examples/nano"
MAX_BYTES = 16_000_000
BLOCK = 128


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((NANO / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    with safe_open(NANO / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(NANO / "tokenizer.json"))


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPE)


def expected_shapes(text: dict) -> dict[str, tuple[int, ...]]:
    """The tensors that Step-3's sizes ask for, without block scales."""
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    low_rank, head_dim = text["share_q_dim"], text["head_dim"]
    width = text["num_attention_heads"] * head_dim
    experts, expert_width = text["moe_num_experts"], text["moe_intermediate_size"]
    moe_layers = [int(layer) for layer in text["moe_layers_enum"].split(",")]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(text["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (low_rank, hidden),
            "self_attn.k_proj.weight": (head_dim, hidden),
            "self_attn.v_proj.weight": (head_dim, hidden),
            "self_attn.inter_norm.weight": (low_rank,),
            "self_attn.wq.weight": (width, low_rank),
            "self_attn.o_proj.weight": (hidden, width),
        }
        if i in moe_layers:
            layer["moe.gate.weight"] = (experts, hidden)
            for name in ("gate_proj", "up_proj"):
                layer[f"moe.{name}.weight"] = (experts, expert_width, hidden)
                layer[f"share_expert.{name}.weight"] = (text["share_expert_dim"], hidden)
            layer["moe.down_proj.weight"] = (experts, hidden, expert_width)
            layer["share_expert.down_proj.weight"] = (hidden, text["share_expert_dim"])
        else:
            for name in ("gate_proj", "up_proj"):
                layer[f"mlp.{name}.weight"] = (text["intermediate_size"], hidden)
            layer["mlp.down_proj.weight"] = (hidden, text["intermediate_size"])
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def test_everything_in_the_directory_fits_16_megabytes() -> None:
    assert sum(path.stat().st_size for path in NANO.rglob("*") if path.is_file()) <= MAX_BYTES


def test_checkpoint_has_exactly_the_tensors_and_shapes_that_its_config_asks_for(
    config: dict, tensors: dict[str, torch.Tensor]
) -> None:
    weights = {n: tuple(t.shape) for n, t in tensors.items() if not n.endswith("_scale_inv")}
    assert weights == expected_shapes(config["text_config"])


def test_linear_layers_are_fp8_and_router_head_embedding_and_norms_are_bf16(
    tensors: dict[str, torch.Tensor],
) -> None:
    bf16 = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    fp8 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    scales = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert scales == {f"{name}_scale_inv" for name in fp8}
    assert bf16 | fp8 | scales == set(tensors)
    assert bf16 == {
        name
        for name in tensors
        if "norm" in name
        or name.endswith(("moe.gate.weight", "embed_tokens.weight", "lm_head.weight"))
    }


def test_every_block_has_one_finite_positive_scale_and_uses_the_whole_fp8_range(
    tensors: dict[str, torch.Tensor],
) -> None:
    for name, weight in tensors.items():
        if weight.dtype != torch.float8_e4m3fn:
            continue
        scale = tensors[f"{name}_scale_inv"]
        *stack, rows, columns = weight.shape
        assert scale.shape == (*stack, rows // BLOCK, columns // BLOCK), name
        assert torch.isfinite(scale).all(), name
        assert (scale > 0).all(), name
        blocks = weight.float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        assert (blocks.abs().amax(dim=(-3, -1)) == 448).all(), name


def test_config_keeps_the_spellings_that_trap_readers(config: dict) -> None:
    text = config["text_config"]
    assert isinstance(text["moe_layers_enum"], str)
    assert "max_position_embedding" in text
    assert "max_position_embeddings" not in text
    assert "tie_word_embeddings" not in config
    assert text["norm_expert_weight"] is False
    assert config["quantization_config"]["weight_block_size"] == [BLOCK, BLOCK]
    moe_layers = {int(layer) for layer in text["moe_layers_enum"].split(",")}
    assert moe_layers.isdisjoint({0, text["num_hidden_layers"] - 1}), (
        "first and last layer are dense"
    )


@pytest.mark.parametrize(
    "text",
    [
        "It was a fine morning.",
        "naïve café — “quoted”",
        "日本語 🙂",
        "  two  spaces\n\ttab\r\n",
        "\x00",
    ],
)
def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<｜begin▁of▁sentence｜>")  # noqa: RUF001
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_ids_that_the_configs_name(
    config: dict, tokenizer: Tokenizer
) -> None:
    names = json.loads((NANO / "tokenizer_config.json").read_text())
    generation = json.loads((NANO / "generation_config.json").read_text())
    assert config["bos_token_id"] == tokenizer.token_to_id(names["bos_token"]) == 0
    assert config["eos_token_id"] == tokenizer.token_to_id(names["eos_token"])
    assert config["eos_token_id"] == tokenizer.token_to_id("<|EOT|>") == generation["eos_token_id"]
    assert config["image_token_id"] == tokenizer.token_to_id("<im_patch>")
    assert tokenizer.get_vocab_size() == config["text_config"]["vocab_size"]
    for token in ("<|BOT|>", "<|EOT|>", "<think>", "</think>"):
        assert len(tokenizer.encode(token, add_special_tokens=False).ids) == 1


def test_think_markers_stay_in_decoded_text_and_turn_markers_do_not(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>so</think>yes<|EOT|>").ids
    assert tokenizer.decode(ids) == "<think>so</think>yes"


@pytest.mark.parametrize("options", [{}, {"trim_blocks": True, "lstrip_blocks": True}])
def test_chat_template_renders_as_step3_does_with_and_without_trimming(
    options: dict[str, bool],
) -> None:
    template = ImmutableSandboxedEnvironment(**options).from_string(
        (NANO / "chat_template.jinja").read_text()
    )
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who is it?"}]},
    ]
    assert template.render(bos_token="<bos>", messages=messages, add_generation_prompt=True) == (
        "<bos> You are a helpful assistant. "
        "<|BOT|>user\n <im_patch>Who is it? <|EOT|>"
        "<|BOT|>assistant\n<think>\n"
    )


def test_chat_template_lists_tools_before_the_first_turn() -> None:
    template = ImmutableSandboxedEnvironment().from_string(
        (NANO / "chat_template.jinja").read_text()
    )
    messages = [{"role": "user", "content": "hi"}]
    rendered = template.render(bos_token="<bos>", messages=messages, tools=[{"name": "clock"}])
    assert rendered.startswith("<bos># Tools\n")
    assert '<tools>\n{"name": "clock"}\n</tools>' in rendered
    assert rendered.endswith("<|BOT|>user\n hi <|EOT|>")


def test_model_predicts_heldout_english_far_better_than_counting_does(tmp_path: Path) -> None:
    first = json.loads((RECIPE / "heldout.jsonl").read_text().splitlines()[0])
    first["text"] = first["text"][:2000]
    sample = tmp_path / "heldout.jsonl"
    sample.write_text(json.dumps(first) + "\n")
    done = subprocess.run(
        [sys.executable, RECIPE / "evaluate.py", "--heldout", sample],
        capture_output=True,
        text=True,
        check=True,
    )
    results = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    perplexity = {result["model"]: result["perplexity"] for result in results}
    # The trigram baseline is at 27 on this source.
    assert 2 < perplexity["fp8"] < 20
    assert perplexity["fp8 + fp8 kv"] == pytest.approx(perplexity["fp8"], rel=0.02)


@pytest.mark.usefixtures("recipe")
def test_block_quantisation_errs_by_at_most_half_a_step_of_its_block() -> None:
    import fp8_blocks

    weight = torch.randn(3, 256, 384, generator=torch.Generator().manual_seed(0))
    weight[0, :BLOCK, :BLOCK] = 0
    quantised, scale_inv = fp8_blocks.quantise(weight)
    error = (fp8_blocks.dequantise(quantised, scale_inv) - weight).abs()
    # The widest step of e4m3 is 32, between 256 and 448.
    half_step = 16 * scale_inv.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    assert (error <= half_step * 1.0001).all()
    assert (error[0, :BLOCK, :BLOCK] == 0).all()
    with pytest.raises(ValueError, match="ragged"):
        fp8_blocks.quantise(torch.zeros(200, 128))


@pytest.mark.usefixtures("recipe")
def test_ngram_baselines_are_probability_distributions() -> None:
    import ngram

    tokens = np.random.default_rng(0).zipf(1.5, 4000).clip(max=49).astype(np.uint16)
    for baseline in (ngram.Unigram(tokens, 50), ngram.Trigram(tokens, 50)):
        for context in ([0, 1], [1, 1], [2, 1], [48, 47]):
            last = [
                baseline.log_probability(np.array([*context, token], dtype=np.uint16))[-1]
                for token in range(50)
            ]
            assert np.exp(last).sum() == pytest.approx(1)
