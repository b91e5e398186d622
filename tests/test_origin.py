"""A memory on a model that it was not made for: said once."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from namm_ext import NAMM, NAMMCache, NAMMConfig, patch, zoo
from namm_ext.cli.shared import load_policy
from namm_ext.fitting import calibrate, training_texts
from namm_ext.policy import origin
from transformers import LlamaConfig, LlamaForCausalLM

MADE_FOR = {"model_type": "llama", "num_hidden_layers": 3}


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "_said", set())


@pytest.fixture(scope="module")
def another() -> Any:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def said(model: Any, policy: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        NAMMCache(model, policy)
    return [str(warning.message) for warning in found]


def test_bundled_on_its_own_model() -> None:
    assert said(zoo.load_model(), NAMM.from_pretrained("bundled:stdlib-1m")) == []


def test_bundled_on_another_model_says_so_once(another: Any) -> None:
    memory = NAMM.from_pretrained("bundled:stdlib-1m")
    (message,) = said(another, memory)
    assert message.startswith(
        "NAMMCache: the memory was made for another model (model_type llama, num_hidden_layers 4, "
    )
    assert "than this one (model_type llama, num_hidden_layers 2, hidden_size 32, " in message
    assert said(another, memory) == said(another, memory.with_budget(size=64)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patch(another, memory):  # it is said already
            pass


def test_made_for_none_says_nothing(another: Any) -> None:
    memory = NAMM.from_pretrained("bundled:stdlib-1m")
    assert said(another, memory.with_made_for(None)) == []
    assert said(another, NAMM(NAMMConfig())) == []


def test_calibration_makes_ready(another: Any) -> None:
    memory = NAMM.from_pretrained("bundled:stdlib-1m")
    texts = training_texts(zoo.load_tokenizer(), length=128, count=1)
    ready = calibrate(memory.with_made_for(None), another, texts)
    assert ready.made_for == origin.shape_of(another.config)
    assert said(another, ready) == []
    assert len(said(zoo.load_model(), ready.with_calibration(None))) == 1


def test_files_keep_it(tmp_path: Path) -> None:
    memory = NAMM(NAMMConfig(), made_for=MADE_FOR)
    assert memory.fingerprint() == NAMM(NAMMConfig()).fingerprint()  # it decides nothing
    for derived in (memory.with_gate(None), memory.with_params(memory.params + 1)):
        assert derived.made_for == MADE_FOR
    memory.save_pretrained(tmp_path)
    assert NAMM.from_pretrained(tmp_path).made_for == MADE_FOR
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "made_for": "llama"}))
    with pytest.raises(ValueError, match=r"made_for must be a section, got 'llama'"):
        NAMM.from_pretrained(tmp_path)
    path.write_text(json.dumps({**content, "made_for": {}}))
    with pytest.raises(ValueError, match="checksum"):
        NAMM.from_pretrained(tmp_path)


def test_the_command_line_says_it_itself(another: Any, capsys: pytest.CaptureFixture[str]) -> None:
    memory, name = load_policy(None, "my-model")
    assert name == "bundled:stdlib-1m"
    assert "no memory comes with my-model" in capsys.readouterr().err
    assert said(another, memory) == []
    own, _ = load_policy(None, "stdlib-1m")
    assert own.made_for is not None
    assert capsys.readouterr().err == ""
