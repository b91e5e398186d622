"""Failures at any place of a forward pass."""

from __future__ import annotations

import sys
from pathlib import Path

import namm_ext
from namm_ext import ops
from namm_ext.ragged import RaggedKV
from transformers import cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer


class Interrupt(BaseException):
    """As KeyboardInterrupt: no ``except Exception`` sees it."""


class Injector:
    """Raises at the n-th of the places that it is told about."""

    def __init__(self):
        self.count, self.at = 0, None
        self.places = []

    def tick(self, place=None):
        self.count += 1
        self.places.append(place)
        if self.count == self.at:
            raise Interrupt

    def points(self):
        """The places of a run in which nothing failed."""
        return list(range(1, self.count + 1))


class AroundParts(Injector):
    """Before and after every op, update, stock layer and MLP of a forward pass."""

    def __init__(self, monkeypatch, model):
        super().__init__()
        update = ("spectrogram", "bam_scores", "gate_", "select", "compact")
        for name in ("append_", "attend_", "record_", *update):
            monkeypatch.setattr(ops, name, self.around(getattr(ops, name)))
        monkeypatch.setattr(RaggedKV, "update", self.around(RaggedKV.update))
        update = DynamicSlidingWindowLayer.update
        monkeypatch.setattr(DynamicSlidingWindowLayer, "update", self.around(update))
        linear = getattr(cache_utils, "LinearAttentionLayer", None)
        if linear is not None:
            update = linear.update_conv_state
            monkeypatch.setattr(linear, "update_conv_state", self.around(update))
        for layer in model.model.layers:
            block = getattr(layer, "mlp", None) or layer.feed_forward
            monkeypatch.setattr(block, "forward", self.around(block.forward))

    def around(self, function):
        def wrapped(*args, **kwargs):
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return wrapped

    def run(self, function, *args):
        return function(*args)


class AtLines(Injector):
    """At every line of the store and of the cache, as Ctrl-C would."""

    def __init__(self, monkeypatch, model):
        super().__init__()
        folder = Path(namm_ext.__file__).parent
        self.call = 0
        self.folders = (str(folder / "ragged"), str(folder / "cache"))

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.folders):
            return None
        if event == "line":
            self.tick((self.call, frame.f_code.co_filename, frame.f_lineno))
        return self.trace

    def points(self):
        """Every line the first and the last time that it runs in a call."""
        points = range(1, self.count + 1)
        last = dict(zip(self.places, points, strict=True))
        first = dict(zip(reversed(self.places), reversed(points), strict=True))
        return sorted({*first.values(), *last.values()})

    def run(self, function, *args):
        self.call += 1
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            return function(*args)
        finally:
            sys.settrace(before)
