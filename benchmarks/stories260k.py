"""The trained Llama of 260 thousand weights in ../shared/data, as a folder of Hugging Face with its tokenizer."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, processors

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "model_stories260k"
UNKNOWN, BOS, EOD = "<unk>", "<s>", "</s>"


def write_model(path: Path) -> Path:
    """``config.json`` and ``model.safetensors`` in ``path``, which is returned."""
    about = json.loads((STORIES / "stories260K.json").read_text())["config"]
    with np.load(STORIES / "stories260K.npz") as file:
        given = {name: file[name] for name in file.files}
    heads, kv_heads, layers = about["n_heads"], about["n_kv_heads"], about["n_layers"]
    tensors = {"model.embed_tokens.weight": given["tok_embeddings"], "model.norm.weight": given["norm"]}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": given["attention_norm"][layer],
            at + "post_attention_layernorm.weight": given["ffn_norm"][layer],
            at + "self_attn.q_proj.weight": _in_halves(given["wq"][layer], heads),
            at + "self_attn.k_proj.weight": _in_halves(given["wk"][layer], kv_heads),
            at + "self_attn.v_proj.weight": given["wv"][layer],
            at + "self_attn.o_proj.weight": given["wo"][layer],
            at + "mlp.gate_proj.weight": given["w1"][layer],
            at + "mlp.down_proj.weight": given["w2"][layer],
            at + "mlp.up_proj.weight": given["w3"][layer],
        }
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")
    config = {
        "model_type": "llama",
        "hidden_size": about["dim"],
        "intermediate_size": about["hidden_dim"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": about["vocab_size"],
        "max_position_embeddings": about["max_seq_len"],
        "rms_norm_eps": about["norm_eps"],
        "rope_theta": about["rope_theta"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_tokenizer(path: Path) -> Path:
    """``tokenizer.json`` and what transformers reads beside it, in ``path``, which is returned. The merges of sentencepiece's
    BPE are the pairs that make a piece, the best piece first; BOS is put before a text where special tokens are asked for."""
    pieces, scores = _pieces()
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (-scores[number], number, vocab[piece[:cut]], (piece[:cut], piece[cut:]))
        for number, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if number > 258 and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    pairs = [pair for *_, pair in sorted(merges)]
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens([UNKNOWN, BOS, EOD])
    model.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    model.save(str(path / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNKNOWN, "bos_token": BOS, "eos_token": EOD}
    (path / "tokenizer_config.json").write_text(json.dumps(about | {"clean_up_tokenization_spaces": False}))
    return path


def _pieces() -> tuple[list[str], list[float]]:
    """The pieces of ``tok512.bin``, each a float32 score, an int32 length and its bytes, in sentencepiece's spelling."""
    data, pieces, scores = (STORIES / "tok512.bin").read_bytes()[4:], [], []
    while data:
        score, length = struct.unpack("<fi", data[:8])
        pieces.append(data[8 : 8 + length].decode().replace(" ", "\u2581"))
        scores.append(score)
        data = data[8 + length :]
    pieces[:3] = [UNKNOWN, BOS, EOD]
    return pieces, scores


def _in_halves(matrix_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows whose rotary pairs lie side by side, as rows whose pairs lie in two halves."""
    out, width = matrix_OI.shape
    return matrix_OI.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)
