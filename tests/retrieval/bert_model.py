"""A tiny encoder of BERT's form with random weights, as a folder that Hugging Face's libraries read."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_act": "gelu",
    "max_position_embeddings": 72,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
}


def write_bert(folder: Path, **changes: object) -> Path:
    """The folder, with ``config.json`` changed."""
    folder.mkdir(parents=True)
    tokenizer = character_tokenizer()
    config = {**CONFIG, "vocab_size": tokenizer.get_vocab_size(), **changes}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config), folder / "model.safetensors")
    return folder


def character_tokenizer() -> tokenizers.Tokenizer:
    """A WordPiece tokenizer of single characters, told to pad and to truncate as those on the hub often are."""
    characters = string.ascii_lowercase + string.digits + "?!.,:<>|"
    words = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    model = tokenizers.models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(20)
    return tokenizer


def random_weights(config: dict) -> dict[str, np.ndarray]:
    """Every tensor of the encoder and of its pooler, none of them trivially 0 or 1."""
    D, F = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], D),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], D),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], D),
    }
    norms, linear = ["embeddings.LayerNorm"], {"pooler.dense": (D, D)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        linear |= {f"{prefix}.attention.self.{name}": (D, D) for name in ("query", "key", "value")}
        linear |= {f"{prefix}.attention.output.dense": (D, D), f"{prefix}.intermediate.dense": (F, D)}
        linear |= {f"{prefix}.output.dense": (D, F)}
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
    rng = np.random.default_rng(0)
    weights = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
    for name, shape in linear.items():
        weights[f"{name}.weight"] = 1.2 / shape[1] ** 0.5 * rng.standard_normal(shape)
        weights[f"{name}.bias"] = 0.1 * rng.standard_normal(shape[0])
    for name in norms:
        weights[f"{name}.weight"] = 1 + 0.2 * rng.standard_normal(D)
        weights[f"{name}.bias"] = 0.2 * rng.standard_normal(D)
    return {name: values.astype(np.float32) for name, values in weights.items()}
