"""``namm chat``: turns in one cache, commands, and an answer that is cut short."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from namm_ext import NAMMCache, zoo
from namm_ext.baselines import NeverEvict, StreamingLLM
from namm_ext.cache import cache_keyword
from namm_ext.cli.app import app
from namm_ext.cli.chat import Conversation
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def loaded(chatting_model: Path) -> tuple[Any, Any]:
    return zoo.load_model(str(chatting_model)), zoo.load_tokenizer(str(chatting_model))


def test_two_turns_are_one_text(loaded: tuple[Any, Any]) -> None:
    """What the cache has read is the chat as the template writes it."""
    model, tokenizer = loaded
    talk = Conversation(model, tokenizer, NeverEvict(n_up=16), 12)
    first, second = talk.say("import os"), talk.say("def f(x):")
    assert second
    text = tokenizer.decode(talk.ids)
    assert text.startswith(f"<user>import os\n<assistant>{first}")
    assert "<user>def f(x):\n<assistant>" in text
    # The last token is not read yet.
    assert talk.cache.get_seq_length() == len(talk.ids) - 1
    with torch.no_grad():
        logits = model(torch.tensor([talk.ids[:-1]])).logits[0, -1]
    assert int(logits.argmax()) == talk.ids[-1]


def test_the_memory_forgets_and_the_chat_goes_on(loaded: tuple[Any, Any]) -> None:
    talk = Conversation(*loaded, StreamingLLM(32, n_up=16), 8)
    for _ in range(4):
        talk.say("x = 1\n" * 12)
    report = talk.cache.report()
    assert report.tokens_kept < 0.5 * report.tokens_seen
    assert f"{talk.cache.get_seq_length():,} tokens read" in talk.status()
    talk.reset()
    assert talk.say("x = 1") == Conversation(*loaded, StreamingLLM(32, n_up=16), 8).say("x = 1")


def test_ctrl_c_ends_an_answer_and_nothing_is_lost(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    talk = Conversation(model, tokenizer, StreamingLLM(32, n_up=16), 40)
    count = 0

    def press(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            signal.raise_signal(signal.SIGINT)

    handle = model.register_forward_pre_hook(press)
    talk.say("import os")
    handle.remove()
    assert count == 5
    ids = torch.tensor([talk.ids])
    assert talk.cache.get_seq_length() == ids.shape[1] - 1
    cache = NAMMCache(model, StreamingLLM(32, n_up=16))
    with torch.no_grad():
        model(ids[:, :-1], **{cache_keyword(model): cache})
        want = model(ids[:, -1:], **{cache_keyword(model): cache}).logits
        got = model(ids[:, -1:], **{cache_keyword(model): talk.cache}).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_chat_over_a_pipe(chatting_model: Path) -> None:
    lines = "x = 1\n/off\n/report\n/what\n/reset\n/report\n\ny = 2\n/exit\nnot read\n"
    command = ["chat", str(chatting_model), "--policy", "bundled:stdlib-1m", "--new-tokens", "4"]
    result = CliRunner().invoke(app, [*command, "--dtype", "float32"], input=lines)
    assert result.exit_code == 0, result.output
    assert "keeps 25% of the tokens" in " ".join(result.output.split())
    assert result.output.count("tokens read") == 2
    assert "There is no /what" in result.output
    assert "Nothing was read yet." in result.output
    assert "of the full cache" in result.output
    assert "not read\n" not in result.output


def test_a_model_that_does_not_chat(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(loaded[0], zoo.load_tokenizer(), NeverEvict(), 4)


def test_the_version() -> None:
    from namm_ext import __version__

    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"namm_ext {__version__}\n")


def test_hub_ids_go_to_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    asked: list[Any] = []
    model, tokenizer = zoo.load_model(), zoo.load_tokenizer()
    whole = (model, {"missing_keys": set()})
    for kind, found in (("AutoModelForCausalLM", whole), ("AutoTokenizer", tokenizer)):
        loader = getattr(transformers, kind)
        monkeypatch.setattr(
            loader, "from_pretrained", lambda name, found=found, **_: asked.append(name) or found
        )
    assert zoo.load_model("owner/name") is model
    assert zoo.load_tokenizer("owner/name") is tokenizer
    assert asked == ["owner/name"] * 2
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not zoo.is_hub_id("owner/name")
    with pytest.raises(FileNotFoundError, match=r"owner/other\.gguf"):
        zoo.load_model("owner/other.gguf")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from namm_ext.cli.shared import load_model

    with pytest.raises(ValueError, match="--device: 'nonsense' cannot be used"):
        load_model(None, device="nonsense")
    model, _, _ = load_model(None, device="cpu")
    assert model.device.type == "cpu"
