#!/usr/bin/env python3
"""Writes docs/models.md: which causal language models of the installed transformers are served.

    tools/models_table.py            # a few minutes
    tools/models_table.py --check llama qwen3_5

Every architecture that transformers knows is built with a few random weights. Served means: in
float64 the logits of reading in pieces with a memory that forgets nothing equal those of
transformers' own cache, and those of a memory that forgets equal a dense model in which what was
forgotten is masked. Refused ones have the reason. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import sys
import textwrap
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hf_models import COMMON, evicting_policy, oracle_logits, oracle_of  # noqa: E402
from hybrid_models import HYBRIDS, from_config  # noqa: E402
from namm_ext import NAMMCache, apply, remove  # noqa: E402
from namm_ext.baselines import NeverEvict  # noqa: E402
from transformers import DynamicCache  # noqa: E402

PAGE = ROOT / "docs/models.md"
CUTS = (0, 40, 41, 60)
LARGEST = 10_000_000  # parameters
INTRO = """# Models

What `tools/models_table.py` finds for the causal language models of transformers {version}, built
tiny and with random weights. **Served**, in float64 and to 1e-6: with a memory that forgets
nothing, reading in pieces gives the logits of transformers' own cache; a memory that forgets gives
those of a dense model in which what was forgotten is masked. Layers that are not full attention
keep transformers' own cache, and cost what they cost there. Vision and other multimodal models are
served if their language model is, unless it reads images in both directions (PaliGemma, Gemma 3
with an image).

{served} served, {refused} refused, {other} others.

| model | layers with a memory | other layers | |
|---|---:|---|---|
"""
# Sizes that some configurations want besides the common ones.
SIZES: dict[str, Any] = {
    "head_dim": 8, "num_layers": 2, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 1024,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "ffn_dim": 48,
    "decoder_layers": 2, "decoder_attention_heads": 4, "d_model": 32, "decoder_ffn_dim": 48,
    "is_decoder": True, "n_shared_experts": 1, "moe_num_experts": 4, "num_layers_decoder": 2,
    "word_embed_proj_dim": 32, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "rotary_dim": 8,
    "n_ctx": 1024, "dim": 32, "ffn_hidden_size": 48, "moe_k": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "attention_chunk_size": 16, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 97,
}  # fmt: skip
# Architectures whose tiny configuration is that of another name.
SAME = {"granitemoehybrid": "granite_4_h"}


def config_of(name: str, num_layers: int = 2) -> Any:
    """A tiny configuration of an architecture."""
    same = SAME.get(name, name if name in HYBRIDS else name.removesuffix("_text"))
    same = f"{same}_shared" if f"{same}_shared" in HYBRIDS else same
    if same in HYBRIDS:
        return HYBRIDS[same]()
    kind = transformers.CONFIG_MAPPING[name]
    known = inspect.signature(kind.__init__).parameters
    fields = {f.name for f in getattr(kind, "__dataclass_fields__", {}).values()}
    sizes = {**SIZES, **COMMON, "num_hidden_layers": num_layers}
    values = {k: v for k, v in sizes.items() if k in known or k in fields}
    if "kv_lora_rank" in values:  # its heads share one latent
        values["num_key_value_heads"] = values["num_attention_heads"]
    return kind(**values)


@torch.no_grad()
def _feed(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    parts = [model(ids[:, a:b], **{key: cache}, use_cache=True).logits for a, b in pairwise(CUTS)]
    return torch.cat(parts, dim=1)


def judge(name: str) -> tuple[str, int, str, str]:
    """As `_judge`, with as many layers as it takes for one with full attention."""
    found = _judge(name, 2)
    if "must have full attention" in found[3]:
        found = _judge(name, 6)
    if "must have full attention" in found[3]:
        served = _judge(name, 2, sliding_window=None)
        if served[0] == "served":
            return (*served[:3], "with sliding_window=None")
    if found[0] == "not built" and (kinds := _kinds(name)):
        again = _judge(name, len(kinds), layer_types=kinds)
        found = found if again[0] == "not built" else again
    return found


def _kinds(name: str) -> list[str]:
    """One layer of each kind that an architecture has by default."""
    try:
        config = transformers.CONFIG_MAPPING[name]().get_text_config(decoder=True)
    except Exception:  # no defaults
        return []
    return list(dict.fromkeys(getattr(config, "layer_types", None) or []))


def _judge(name: str, num_layers: int, **changes: Any) -> tuple[str, int, str, str]:
    """(verdict, layers with a memory, other layers, remark) of an architecture."""
    try:
        torch.manual_seed(0)
        config = config_of(name, num_layers)
        for field, value in changes.items():
            setattr(config, field, value)
        with torch.device("meta"):
            size = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
        if size > LARGEST:
            return "not built", 0, "", f"{size:,} parameters with the sizes that are tried"
        model = from_config(config).double().eval()
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(3, min(vocabulary, 90), (1, CUTS[-1]))
        with torch.no_grad():
            model(ids)
    except Exception as error:  # sizes that do not fit, or code that float64 does not have
        return "not built", 0, "", _short(error)
    try:
        apply(model, NeverEvict(n_up=16))
        remove(model)
        memory = NAMMCache(model, NeverEvict(n_up=16))
    except Exception as error:
        return "refused", 0, "", _short(error)
    others = sorted({type(x).__name__ for x in memory.layers if type(x).__name__ != "NAMMLayer"})
    count, others = len(memory.memory_layers), ", ".join(map(_plain, others))
    try:
        want = _feed(model, DynamicCache(config=model.config), ids)
    except Exception as error:
        return "stock fails", count, others, _short(error)
    try:
        far = float((_feed(model, memory, ids) - want).abs().max())
    except Exception as error:
        return "refused", count, others, _short(error)
    if not far <= 1e-6:
        return "differs", count, others, f"by {far:.0e}"
    try:
        far = _far_from_oracle(model, ids)
    except Exception as error:
        return "differs", count, others, _short(error)
    if not far <= 1e-6:
        return "differs", count, others, f"by {far:.0e} where it forgets"
    return "served", count, others, ""


@torch.no_grad()
def _far_from_oracle(model: Any, ids: torch.Tensor) -> float:
    """How far logits with a memory that forgets are from those of a masked dense model."""
    policy = evicting_policy(budget=9)
    memory = NAMMCache(model, policy)
    got = model(ids, past_key_values=memory, use_cache=True).logits
    oracle = oracle_of(policy, memory)
    remove(model)
    return float((got - oracle_logits(model, oracle, ids)).abs().max())


def _plain(name: str) -> str:
    return {
        "DynamicSlidingWindowLayer": "sliding",
        "LinearAttentionLayer": "recurrent",
        "DummyLayer": "without attention",
    }.get(name, name)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    for prefix in ("NAMMCache: ", "apply: ", "namm: "):
        text = text.removeprefix(prefix)
    return textwrap.shorten(text.split("; ")[0], 150, placeholder=" ...").replace("|", "/")


def table(names: list[str]) -> tuple[dict[str, int], list[str]]:
    """How many of each verdict, and a line for each architecture."""
    counts: dict[str, int] = {}
    lines = []
    for name in names:
        verdict, count, others, remark = judge(name)
        counts[verdict] = counts.get(verdict, 0) + 1
        shown = f"**served** {remark}".strip() if verdict == "served" else f"{verdict}: {remark}"
        lines.append(f"| {name} | {count or ''} | {others} | {shown} |")
        print(lines[-1], flush=True)
        gc.collect()
    return counts, lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", nargs="+", metavar="NAME", help="compare these lines alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if args.check:
        _, lines = table(args.check)
        page = PAGE.read_text(encoding="utf-8")
        stale = [line for line in lines if line not in page]
        print("\n".join(stale) or "as in docs/models.md")
        return int(bool(stale))
    names = sorted(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    counts, lines = table(names)
    other = sum(n for verdict, n in counts.items() if verdict not in ("served", "refused"))
    intro = INTRO.format(
        version=transformers.__version__, served=counts.get("served", 0),
        refused=counts.get("refused", 0), other=other,
    )  # fmt: skip
    PAGE.write_text(intro + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
