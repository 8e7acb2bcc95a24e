"""Write SmolLM2-135M-Instruct in another form. It runs in the environment ``smollm2`` of the benchmarks.

``convert.py GGUF FORM OUT``. ``GGUF`` is the packaged file. The forms:

f32   a GGUF file with float32 weights
hf    a Hugging Face folder with float32 weights, for vLLM and transformers
tiny  a Hugging Face folder of a Llama with random weights and the same tokenizer, for tensor parallelism
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from safetensors.numpy import save_file

# The sizes of the tiny Llama. Two heads of keys, so that two processes can share them.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM has on CPUs
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,  # else it repeats one token
}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONTROL = 3  # the type of a token that is no text


def main(source: Path, form: str, out: Path) -> None:
    """Write the form to ``out``."""
    reader = GGUFReader(source)
    if form == "f32":
        _gguf(reader, out)
        return
    out.mkdir(parents=True)
    config = _config(reader) if form == "hf" else {**_config(reader), **TINY}
    weights = _weights(reader, config) if form == "hf" else _random_weights(config)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    _tokenizer(reader, out)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file lets only its own user read the file


def _field(reader: GGUFReader, name: str):
    return reader.fields[name].contents()


def _gguf(reader: GGUFReader, out: Path) -> None:
    """Copy all fields, and write all weights as float32."""
    writer = GGUFWriter(out, _field(reader, "general.architecture"))
    writer.add_file_type(0)  # all weights are float32
    written = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in written:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, _values(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _values(tensor) -> np.ndarray:
    """Return a tensor as float32, with the outer axis first."""
    return np.ascontiguousarray(
        dequantize(tensor.data, tensor.tensor_type).reshape(tuple(map(int, reversed(tensor.shape)))),
        dtype=np.float32,
    )


def _config(reader: GGUFReader) -> dict:
    heads = _field(reader, "llama.attention.head_count")
    hidden = _field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": 1e-5,
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "vocab_size": _field(reader, "llama.vocab_size"),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def _weights(reader: GGUFReader, config: dict) -> dict[str, np.ndarray]:
    """Return the weights by their names in transformers."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for tensor in reader.tensors:
        values = _values(tensor)
        if tensor.name in OUTER:
            found[OUTER[tensor.name]] = values
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in heads:
            values = _unpermuted(values, heads[part])
        found[f"model.layers.{layer}.{LAYER[part]}.weight"] = values
    return found


def _unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows: it has the two halves of a rotation side by side."""
    half = values.shape[0] // heads // 2
    return np.ascontiguousarray(
        values.reshape(heads, half, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    )


def _random_weights(config: dict) -> dict[str, np.ndarray]:
    """Return weights that are always the same. They are large enough for clear greedy choices."""
    random = np.random.default_rng(7)
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes = {
        "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
        "attn_output": (hidden, queries), "attn_norm": (hidden,), "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip

    def made(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return (random.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)

    found = {
        f"model.layers.{layer}.{LAYER[part]}.weight": made(shape)
        for layer in range(config["num_hidden_layers"])
        for part, shape in shapes.items()
    }
    found["model.embed_tokens.weight"] = made((config["vocab_size"], hidden)) * 8
    found["lm_head.weight"] = made((config["vocab_size"], hidden)) * 8
    found["model.norm.weight"] = made((hidden,))
    return found


def _tokenizer(reader: GGUFReader, out: Path) -> None:
    """Write the files of the tokenizer and its chat template."""
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    special = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == CONTROL
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in _field(reader, "tokenizer.ggml.merges")],
        },
    }
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        "model_max_length": _field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
