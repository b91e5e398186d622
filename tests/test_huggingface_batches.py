"""Batches that go on talking: rows end at different places, and the next turn goes on there."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import FAMILIES, build, evicting_policy, gemma3_config, positions, tokens
from hybrid_models import build_hybrid
from namm_ext import NAMMCache, ops, reference, remove
from namm_ext.baselines import H2O, NeverEvict, StreamingLLM
from namm_ext.ragged import CARRY
from namm_ext.ragged.undo import SILENT
from namm_ext.values import Segments, Window
from transformers import DynamicCache

PAD = 0


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"](), torch.float64)


class Chat:
    """A batch of chats: turns of different lengths, answers that end at different places."""

    def __init__(self, model, cache, rows=3):
        self.model, self.cache = model, cache
        self.ids = torch.zeros(rows, 0, dtype=torch.long)
        self.mask = torch.zeros(rows, 0, dtype=torch.long)

    def hear(self, lengths, seed):
        """The turn of the users, padded on its left."""
        width = max(lengths)
        ids, mask = tokens(len(lengths), width, seed), torch.ones(len(lengths), width).long()
        for row, n in enumerate(lengths):
            mask[row, : width - n] = 0
        self.ids = torch.cat([self.ids, ids * mask], dim=1)
        self.mask = torch.cat([self.mask, mask], dim=1)

    def answer(self, lengths):
        """Row b answers with ``lengths[b]`` tokens; padding behind them is read as if text."""
        width = self.ids.shape[1]
        ends = Ends(width, lengths)
        out = self.model.generate(
            self.ids, attention_mask=self.mask, past_key_values=self.cache, do_sample=False,
            max_new_tokens=max(lengths), logits_processor=[ends], eos_token_id=ends.eos,
            pad_token_id=PAD, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        assert out.sequences.shape[1] == width + max(lengths)
        self.ids, self.mask = out.sequences, torch.cat([self.mask, mask], dim=1)
        logits = torch.stack(out.logits, dim=1)
        return logits[mask.bool()]


class Ends:
    """Lets each row end after so many tokens, and not before."""

    eos = 1

    def __init__(self, width, lengths):
        self.width, self.lengths = width, lengths

    def __call__(self, input_ids, scores):
        n, scores = input_ids.shape[1] - self.width, scores.clone()
        scores[:, [PAD, self.eos]] = -torch.inf
        for row, length in enumerate(self.lengths):
            if n == length - 1:
                scores[row] = -torch.inf
                scores[row, self.eos] = 0.0
        return scores


TURNS = [((20, 9, 14), (12, 5, 12)), ((7, 3, 11), (2, 25, 9)), ((5, 30, 1), (9, 9, 4))]


def talk(chat, turns=TURNS):
    logits = []
    for i, (heard, said) in enumerate(turns):
        chat.hear(heard, seed=i)
        logits.append(chat.answer(said))
    return logits


@pytest.mark.parametrize("n_up", [16, 64])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_three_turns_equal_stock(kind, n_up):
    """Whether an update came behind an early end or not."""
    model = build(gemma3_config() if kind == "gemma3" else FAMILIES[kind](), torch.float64)
    stock = Chat(model, DynamicCache(config=model.config))
    want = talk(stock)
    ours = Chat(model, NAMMCache(model, NeverEvict(n_up=n_up)))
    got = talk(ours)
    assert torch.equal(ours.ids, stock.ids)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    remove(model)


def text(chat, row):
    return chat.ids[row][chat.mask[row].bool()][None]


def test_rows_are_as_if_they_were_alone(model):
    """Where no update came behind an early end."""
    policy = evicting_policy(budget=9)
    turns = [((20, 3, 14), (12, 5, 11)), ((7, 6, 11), (2, 4, 3)), ((5, 30, 1), (9, 9, 9))]
    chat = Chat(model, NAMMCache(model, policy))
    talk(chat, turns)
    for row in range(3):
        ids = text(chat, row)[:, :-1]
        alone = NAMMCache(model, policy)
        with torch.no_grad():
            model(ids, past_key_values=alone)
        held = [layer.kv.seen[row] for layer in chat.cache.layers]
        assert held == [ids.shape[1]] * 2
        for ours, theirs in zip(chat.cache.layers, alone.layers, strict=True):
            assert positions(ours, row) == positions(theirs)


@pytest.mark.parametrize("policy", [StreamingLLM(12, 16), H2O(12, 16), evicting_policy(budget=12)],
                         ids=["StreamingLLM", "H2O", "NAMM"])  # fmt: skip
def test_what_came_behind_an_end_is_gone(model, policy):
    """Updates came in between: of row 1 nothing stays that it was not told."""
    chat = Chat(model, NAMMCache(model, policy))
    talk(chat, [((20, 9, 14), (40, 5, 40))])
    real = 9 + 4  # the last token of an answer is read with the next turn
    held = [positions(layer, 1) for layer in chat.cache.layers]
    assert any(p >= real for layer in held for head in layer for p in head)
    chat.hear((3, 3, 3), seed=7)
    twin = copy.deepcopy(chat.cache)
    read(chat, twin)
    for before, layer in zip(held, twin.layers, strict=True):
        boundary = (layer.kv.seen[1] - 3) // 16 * 16
        for old, now in zip(before, positions(layer, 1), strict=True):
            assert [p for p in now if p < boundary] == [p for p in old if p < real]
            assert [p for p in now if p >= boundary] == list(range(boundary, boundary + 3))
        silent = slice(max(CARRY - boundary + real, 0), CARRY)
        assert (layer.kv.lse_window[1, :, silent] == SILENT).all()
        assert (layer.kv.lse_window[0] < SILENT).all()
        assert layer.kv.lengths == tuple(layer.kv.store.segments.seqused_k.tolist())
    assert all(t.isfinite().all() for t in chat.answer([5, 5, 5]))


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5", "gpt_oss", "gemma4_shared", "deepseek_v3"])
def test_hybrids_equal_stock(name):
    model = build_hybrid(name)
    stock = Chat(model, DynamicCache(config=model.config))
    want = talk(stock, TURNS[:2])
    ours = Chat(model, NAMMCache(model, NeverEvict(n_up=16)))
    got = talk(ours, TURNS[:2])
    assert torch.equal(ours.ids, stock.ids)
    torch.testing.assert_close(got[1], want[1], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def read(chat, cache):
    """The columns that the cache has not seen."""
    seen = cache.get_seq_length()
    return chat.model(
        chat.ids[:, seen:], attention_mask=chat.mask, past_key_values=cache,
        position_ids=(chat.mask.cumsum(1) - 1)[:, seen:].clamp(min=0),
    ).logits  # fmt: skip


def test_holes_are_where_a_call_is_cut(model):
    policy = evicting_policy(budget=9)
    ids, mask = tokens(3, 80), torch.ones(3, 80, dtype=torch.long)
    mask[0, 30:33], mask[1, 5:9], mask[1, 40:70], mask[2, :] = 0, 0, 0, 0
    chat = Chat(model, NAMMCache(model, policy))
    chat.ids, chat.mask = ids, mask
    logits = read(chat, chat.cache)
    assert [x.kv.seen for x in chat.cache.layers] == [(77, 46, 0)] * 2
    for row in (0, 1):
        alone = NAMMCache(model, policy)
        real = mask[row].bool()
        with torch.no_grad():
            want = model(ids[row, real][None], past_key_values=alone).logits
        torch.testing.assert_close(logits[row, real][None], want, atol=1e-9, rtol=1e-9)
        for ours, theirs in zip(chat.cache.layers, alone.layers, strict=True):
            assert positions(ours, row) == positions(theirs)


class Stop(Exception):
    pass


def test_a_call_that_fails_behind_an_end(model):
    """The first layer has gone back, the second has not."""

    def stop(*_):
        raise Stop

    chat = Chat(model, NAMMCache(model, evicting_policy(budget=9)))
    talk(chat, [((20, 9, 14), (40, 5, 38))])
    chat.hear((3, 3, 3), seed=7)
    twin = copy.deepcopy(chat.cache)
    want = read(chat, twin)
    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        read(chat, chat.cache)
    handle.remove()
    cropped = copy.deepcopy(chat.cache)
    cropped.crop(-1)
    assert [x.kv.seen[1] for x in cropped.layers] == [48, 48]
    torch.testing.assert_close(read(chat, chat.cache), want, atol=0, rtol=0)
    assert [x.kv.seen for x in chat.cache.layers] == [x.kv.seen for x in twin.layers]
    with pytest.raises(RuntimeError, match="crop: cannot undo the memory update"):
        chat.cache.crop(-60)


def test_a_file_of_rows_that_ended(model, tmp_path):
    policy = evicting_policy(budget=9)
    chat = Chat(model, NAMMCache(model, policy))
    talk(chat, [((20, 9, 14), (40, 5, 40)), ((3, 3, 3), (4, 4, 4))])
    chat.hear((30, 30, 30), seed=8)
    chat.cache.save(tmp_path / "memory")
    loaded = NAMMCache.load(tmp_path / "memory", model, policy)
    torch.testing.assert_close(read(chat, loaded), read(chat, chat.cache), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silent_queries_count_as_none(dtype):
    """As if the period before had no queries there: the law's tail of zeros."""
    generator = torch.Generator().manual_seed(0)
    n, rows, dim = 40, CARRY + 32, 8
    q, k = (torch.randn(m, dim, generator=generator).to(dtype) for m in (rows, n))
    int32 = {"dtype": torch.int32}
    pos = torch.arange(n, **int32)
    segments = Segments(
        k, k, pos, torch.zeros(n, 17, dtype=dtype), torch.tensor([0, n], **int32),
        torch.tensor([n], **int32),
    )  # fmt: skip
    lse = torch.full((1, 1, rows), 2.0, dtype=dtype)
    lse[:, :, :CARRY] = SILENT
    window = Window(q[None, None], lse, torch.tensor([n - rows], **int32), torch.tensor([True]))
    got = ops.spectrogram(window, segments, softmax_scale=0.5, ema_coeff=0.99)
    at = torch.arange(rows) + n - rows
    attn = (q @ k.T * 0.5 - 2.0).exp() * (pos <= at[:, None])
    mags = reference.spectrogram_from_attention(attn[CARRY:])
    want = reference.fold_ema(mags, torch.zeros(n, 17, dtype=dtype), 0.99)
    torch.testing.assert_close(got, want.to(dtype), atol=1e-5, rtol=1e-5)
    received = ops.attention_received(window, segments, softmax_scale=0.5, first_row=0)
    torch.testing.assert_close(received, attn[CARRY:].sum(0), atol=1e-4, rtol=1e-5)
