"""What updates leave reserved on a device, by a model of PyTorch's allocator.

Each update allocates a store and frees the old one. While stores grow, no block that was freed is
large enough for the next, so ``cudaMalloc`` is asked again and again; expandable segments join
what is free. ``docs/cuda.md`` tells users to set them.
"""

from __future__ import annotations

import random

import pytest
from caching_allocator import MIB, CachingAllocator

LAYERS, HEADS, N_UP, UPDATES = 8, 8, 512, 96
#: Bytes per token and head of k, v, pos and state, at a head of 128 in 16 bits.
STORE = (256, 256, 4, 68)
#: Of scores, keep and the new state.
DECISION = (4, 1, 68)


def kept_of(rule, seen, rng):
    kept = {"fraction": seen // 4, "budget": min(seen, 4096)}[rule]
    return sum(int(kept * (0.8 + 0.4 * rng.random())) for _ in range(HEADS))


def after_updates(rule, *, expandable, together):
    """The allocator after ``UPDATES`` updates of all layers, whose heads keep what they like."""
    allocator, rng = CachingAllocator(expandable=expandable), random.Random(0)
    rows = [HEADS * N_UP] * LAYERS
    stores = [[allocator.malloc(n * size) for size in STORE] for n in rows]
    for update in range(1, UPDATES + 1):
        decisions = {}
        for layer in range(LAYERS):
            decisions[layer] = [allocator.malloc(rows[layer] * size) for size in DECISION]
            if together and layer < LAYERS - 1:
                continue
            for each in list(decisions):
                rows[each] = kept_of(rule, update * N_UP, rng) + HEADS * N_UP
                new = [allocator.malloc(rows[each] * size) for size in STORE]
                for block in (*stores[each], *decisions.pop(each)):
                    allocator.free(block)
                stores[each] = new
    return allocator


@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("rule", ["fraction", "budget"])
def test_expandable_segments_use_freed_blocks_again(rule, together):
    allocator = after_updates(rule, expandable=True, together=together)
    assert allocator.reserved < 1.4 * allocator.peak


def test_without_them_growing_stores_leave_their_blocks_behind():
    allocator = after_updates("fraction", expandable=False, together=False)
    assert allocator.reserved > 3 * allocator.peak
    settled = after_updates("budget", expandable=False, together=False)
    assert settled.reserved < 2.5 * settled.peak  # at a budget it stops


def test_the_model_splits_and_joins():
    allocator = CachingAllocator()
    a, b = allocator.malloc(12 * MIB), allocator.malloc(2 * MIB)
    assert allocator.reserved == 12 * MIB + 20 * MIB  # a segment each, as cudaMalloc gives them
    c = allocator.malloc(10 * MIB)  # behind b
    assert allocator.reserved == 32 * MIB
    for block in (b, c, a):
        allocator.free(block)
    allocator.malloc(20 * MIB)
    assert (allocator.reserved, allocator.allocated) == (32 * MIB, 20 * MIB)
    expandable = CachingAllocator(expandable=True)
    blocks = [expandable.malloc(10 * MIB) for _ in range(4)]
    for block in blocks[:2]:
        expandable.free(block)
    expandable.malloc(20 * MIB)
    assert expandable.reserved == 40 * MIB
