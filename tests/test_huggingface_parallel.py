"""Tensor parallelism: every process holds the memory of its own heads."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from hf_models import FAMILIES, build, evicting_policy, positions, tokens
from namm_ext import NAMMCache

pytest.importorskip("accelerate")  # transformers wants it for tp_plan
pytestmark = pytest.mark.slow
POLICY = {"budget": 10}


def _run(rank: int, world: int, port: int, folder: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", dtype=torch.float64
    ).eval()
    cache = NAMMCache(model, evicting_policy(**POLICY))
    out = model.generate(tokens(1, 60), max_new_tokens=10, do_sample=False, past_key_values=cache)
    held = [positions(layer) for layer in cache.layers]
    torch.save((out, held), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    model = build(FAMILIES["llama"](), torch.float64)
    model.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run, (2, port, str(tmp_path)), nprocs=2)
    cache = NAMMCache(model, evicting_policy(**POLICY))
    want = model.generate(tokens(1, 60), max_new_tokens=10, do_sample=False, past_key_values=cache)
    held = [positions(layer) for layer in cache.layers]
    for rank in (0, 1):
        out, mine = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(out, want)
        assert mine == [[heads[rank]] for heads in held]


def test_offloaded_weights(tmp_path):
    """accelerate's hooks move arguments and results; the cache must pass through untouched."""
    import accelerate

    model = build(FAMILIES["llama"](), torch.float64)
    policy = evicting_policy(**POLICY)
    settings = {"max_new_tokens": 20, "do_sample": False}
    cache = NAMMCache(model, policy)
    want = model.generate(tokens(1, 60), past_key_values=cache, **settings)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    again = NAMMCache(model, policy)
    assert torch.equal(model.generate(tokens(1, 60), past_key_values=again, **settings), want)
    assert [positions(x) for x in again.layers] == [positions(x) for x in cache.layers]
