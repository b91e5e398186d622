"""What each rule ranks by, on the oracle's dense history.

Dead tokens are masked by the selection.
"""

from __future__ import annotations

import torch


def by_position(oracle, layer, index, t):
    return torch.arange(layer.alive.shape[1]).expand_as(layer.alive)


def by_accumulated_attention(oracle, layer, index, t):
    return layer.probs.sum(dim=1)


def by_last_attention(oracle, layer, index, t):
    return layer.probs[:, t - 1]


def by_last_attention_of_the_layer(oracle, layer, index, t):
    return layer.probs[:, t - 1].mean(dim=0).expand_as(layer.alive)


def by_norm(oracle, layer, index, t):
    return -layer.keys.square().sum(-1).sqrt()


def by_key_difference(oracle, layer, index, t):
    scores = torch.zeros(layer.alive.shape, dtype=torch.float64)
    for h, alive in enumerate(layer.alive):
        rows = alive.nonzero().flatten()
        unit = torch.nn.functional.normalize(layer.keys[h, rows], dim=-1)
        scores[h, rows] = -torch.cosine_similarity(layer.keys[h, rows], unit.mean(0)[None], dim=-1)
    return scores


def by_pooled_window(window, kernel):
    def score(oracle, layer, index, t):
        scores = torch.zeros(layer.alive.shape, dtype=torch.float64)
        for h, alive in enumerate(layer.alive):
            rows = alive.nonzero().flatten()
            rows = rows[rows < t - window]
            if rows.numel():
                seen = layer.probs[h, t - window : t][:, rows].sum(0)
                pooled = torch.nn.functional.avg_pool1d(
                    seen[None], kernel, stride=1, padding=kernel // 2
                )
                scores[h, rows] = pooled[0]
        return scores

    return score


def by_expected_attention(sinks, future, epsilon=0.0):
    """Mean and covariance of the queries before RoPE, turned by an explicit mean matrix."""

    def rotation(angles):  # [R / 2] -> [D, D], halves as in Llama
        cos, sin = angles.cos().diag(), angles.sin().diag()
        return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0)

    def score(oracle, layer, index, t):
        _, groups, _, dim = layer.queries.shape
        theta = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        begin = max(sinks, t - oracle.n_up - 16)
        mean_turn = sum(rotation(theta * (t + f)) for f in range(future)) / future
        scores = torch.zeros(layer.alive.shape, dtype=torch.float64)
        for h, alive in enumerate(layer.alive):
            rows = alive.nonzero().flatten()
            rows = rows[rows >= sinks]
            weight = 0.0
            for g in range(groups):
                before_rope = torch.stack(
                    [rotation(theta * i).T @ layer.queries[h, g, i] for i in range(begin, t)]
                )
                mean = mean_turn @ before_rope.mean(0)
                covariance = mean_turn @ before_rope.T.cov(correction=0) @ mean_turn.T
                k = layer.keys[h, rows] * dim**-0.25
                logits = k @ mean * dim**-0.25 + torch.einsum("ti,ij,tj->t", k, covariance, k) / (
                    2 * dim**0.5
                )
                weight = weight + logits.softmax(0) / groups
            scores[h, rows] = (weight + epsilon) * layer.values[h, rows].norm(dim=-1)
            scores[h, :sinks] = scores[h].max()
        return scores

    return score


def by_lag(sinks, lag):
    """The published score of the whole sequence, of which nothing is forgotten."""

    def variation(x):  # [P, lag, D] -> [P - 1, lag]
        low, high = x[1:].amin(1, keepdim=True), x[1:].amax(1, keepdim=True)
        return ((x[:-1] - low) / (high - low)).std(-1).softmax(-1)

    def score(oracle, layer, index, t):
        scores = torch.ones(layer.alive.shape, dtype=torch.float64)
        complete = (t - sinks) // lag
        if complete < 2:
            return scores
        for h in range(len(scores)):
            k, v = (
                x[h, sinks : sinks + complete * lag].unflatten(0, (complete, lag))
                for x in (layer.keys, layer.values)
            )
            rank = (variation(k) + variation(v)).argsort(-1).argsort(-1)
            scores[h, sinks : sinks + (complete - 1) * lag] = rank.flatten() / lag
        return scores

    return score


def by_nested_difference(block, window):
    def score(oracle, layer, index, t):
        scores = torch.zeros(layer.alive.shape, dtype=torch.float64)
        for h, alive in enumerate(layer.alive):
            rows = alive.nonzero().flatten().tolist()
            unit = {p: layer.keys[h, p] / layer.keys[h, p].norm() for p in rows}
            total = torch.zeros(len(rows), dtype=torch.float64)
            for near in (
                lambda p, q, i, j: True,
                lambda p, q, i, j: p // block == q // block,
                lambda p, q, i, j: i - window < j <= i,
            ):
                anomaly = []
                for i, p in enumerate(rows):
                    mean = torch.stack(
                        [unit[q] for j, q in enumerate(rows) if near(p, q, i, j)]
                    ).mean(0)
                    anomaly.append(1 - float(unit[p] @ mean / mean.norm()))
                total += torch.tensor([sum(a < b for a in anomaly) for b in anomaly])
            scores[h, rows] = total / (3 * len(rows))
        return scores

    return score
