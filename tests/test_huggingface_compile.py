"""torch.compile: one opaque op per layer, full graphs, no recompilation for the next cache."""

from __future__ import annotations

import pytest
import torch
from hf_models import FAMILIES, build, evicting_policy, positions, tokens
from hybrid_models import build_hybrid
from namm_ext import NAMMCache
from torch._dynamo.testing import CompileCounterWithBackend

PROMPT, LENGTH = 40, 52


def run(forward, model, cache, ids, mask):
    """Prompt, then token by token."""
    logits = []
    ends = [PROMPT, *range(PROMPT + 1, LENGTH + 1)]
    with torch.no_grad():
        for a, b in zip([0, *ends], ends, strict=False):
            position_ids = (mask[:, :b].cumsum(1) - 1).clamp(min=0)[:, a:b]
            logits.append(
                forward(
                    input_ids=ids[:, a:b],
                    attention_mask=mask[:, :b],
                    position_ids=position_ids,
                    past_key_values=cache,
                ).logits
            )
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("backend", "pad"),
    [
        ("aot_eager", 7),
        pytest.param("eager", 0, marks=pytest.mark.slow),
        pytest.param("eager", 7, marks=pytest.mark.slow),
        pytest.param("aot_eager", 0, marks=pytest.mark.slow),
        pytest.param("inductor", 0, marks=pytest.mark.slow),
        pytest.param("inductor", 7, marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(backend, pad):
    torch._dynamo.reset()
    model = build(FAMILIES["llama"](), torch.float64)
    policy = evicting_policy(budget=10)
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    plain = NAMMCache(model, policy)
    want = run(model, model, plain, ids, mask)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    for _ in range(2):
        cache = NAMMCache(model, policy)
        got = run(compiled, model, cache, ids, mask)
        # RMSNorm is float32 in any model, and inductor fuses it in another order.
        atol = 1e-4 if backend == "inductor" else 1e-9
        torch.testing.assert_close(got[:, pad:], want[:, pad:], atol=atol, rtol=0)
        assert [positions(x, 0) for x in cache.layers] == [positions(x, 0) for x in plain.layers]
        assert cache.layers[0].kv.num_updates == plain.layers[0].kv.num_updates > 0
    assert counter.frame_count <= 3  # prompt, and decoding with at most one dynamic length


def test_compiled_errors_are_the_same():
    torch._dynamo.reset()
    model = build(FAMILIES["llama"]())
    compiled = torch.compile(model.forward, backend="eager")
    cache = NAMMCache(model, evicting_policy())
    with torch.no_grad():
        compiled(tokens(2, 9), past_key_values=cache)
        with pytest.raises(ValueError, match="batch must have 2 rows as before, got 3"):
            compiled(tokens(3, 9), past_key_values=cache)


@pytest.mark.parametrize(
    "name",
    ["lfm2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("deepseek_v3", "gemma4_shared"))],
)
def test_layers_are_compiled_around(name):
    """Calls of recurrent layers are counted outside of the graphs, and all of them are."""
    torch._dynamo.reset()
    model, policy, ids = build_hybrid(name), evicting_policy(budget=10), tokens(1, 60)
    plain, cache = NAMMCache(model, policy), NAMMCache(model, policy)
    compiled = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        for a, b in ((0, 40), (40, 41), (41, 42)):
            want = model(ids[:, a:b], past_key_values=plain).logits
            got = compiled(ids[:, a:b], past_key_values=cache).logits
            torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    cache.session.recurrent.check()
    assert [positions(x) for x in cache.memory_layers] == [
        positions(x) for x in plain.memory_layers
    ]
