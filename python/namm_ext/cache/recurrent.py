"""The layers of hybrids that keep a state instead of keys and values: transformers' own, watched.

Linear attention, state spaces and short convolutions change their state in place, and nothing can
take a token out of it again. What the layers before the first memory knew is kept until a call has
been taken, so one that is refused changes nothing. A call that fails after other layers have read
it cannot be undone; the cache knows of it and says so until ``reset``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer

MethodT = TypeVar("MethodT", bound=Callable[..., Any])

# Only newer versions of transformers have them.
_LINEAR: Any = getattr(cache_utils, "LinearAttentionLayer", None)
_BOTH: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)


def has_memory(layer: Any) -> bool:
    """Whether a layer of transformers keeps keys and values of everything."""
    return type(layer) in (DynamicLayer, _BOTH)


def recurrent_part(layer: Any) -> Any:
    """Of a layer of transformers what keeps a state and nothing else, or None."""
    if _LINEAR is None or type(layer) not in (_LINEAR, _BOTH):
        return None
    return layer if type(layer) is _LINEAR else _LINEAR(number_of_states=layer.number_of_states)


def _untraced(function: MethodT) -> MethodT:
    """Counting calls is nothing for a graph, which would replay it: torch.compile leaves it out."""
    disabled: MethodT = torch.compiler.disable(function)
    return disabled


class Recurrent:
    """The recurrent layers of a cache, and how many calls each of them has read.

    Args:
        layers: by their index. Where attention is in the same layer, it comes behind.
        first, last: index of the first and the last layer with a memory.
    """

    def __init__(self, layers: dict[int, Any], first: int, last: int) -> None:
        self.layers, self.first, self.last = layers, first, last
        # As transformers reads and writes them, whatever else is in their place.
        every = range(max(layers, default=-1) + 1)
        self.cache = Cache(layers=[layers.get(i) or DynamicLayer() for i in every])
        self.clear()

    def clear(self) -> None:
        """Forget everything, the size of the batch too."""
        self.done = 0  # calls that every memory has taken
        self._calls = dict.fromkeys(self.layers, 0)
        self._read = set[tuple[int, str, int]]()  # what was asked for in the current call
        self._before: dict[int, dict[str, Any]] = {}
        for i in self.layers:
            self._forget(i)

    def _forget(self, layer_idx: int) -> None:
        layer = self.layers[layer_idx]
        layer.__init__(number_of_states=layer.number_of_states)

    @_untraced
    def call_begins(self) -> None:
        """Masks are being made, or a state is asked for again: what is read from here on is
        another call. Layers that read one which no memory has taken go back where they can."""
        self._read.clear()
        for i, layer in self.layers.items():
            if self._calls[i] != self.done + 1:
                continue
            if not self.done:
                self._forget(i)
            elif i in self._before:
                vars(layer).update(self._before.pop(i))
            else:
                continue
            self._calls[i] = self.done

    @_untraced
    def reads(self, layer_idx: int, what: str, state_idx: int) -> None:
        """A layer is about to change its state.

        Args:
            layer_idx: its index.
            what: the method of the cache that is called for it, once in a call and state.
            state_idx: the state.

        Raises:
            ValueError: if it has read a call that others have not.
        """
        layer = self.layers[layer_idx]
        if (layer_idx, what, state_idx) in self._read:
            self.call_begins()
        known = any(layer_idx == i for i, _, _ in self._read)
        self._read.add((layer_idx, what, state_idx))
        if known:
            return
        # The memories before it have taken the call already.
        if self._calls[layer_idx] != self.done - (layer_idx > self.last):
            refuse(layer_idx)
        _leave_inference_mode(layer)
        if layer_idx <= self.first:
            self._before[layer_idx] = _states(layer)
        self._calls[layer_idx] += 1

    @_untraced
    def asks(self, layer_idx: int) -> None:
        """A layer asks whether it has a state; some then change it directly (before 5.24)."""
        if not any(layer_idx == i for i, _, _ in self._read):
            self.reads(layer_idx, "has_previous_state", 0)

    def begin(self) -> None:
        """The first memory meets a call: the layers before it have read it, no other.

        Raises:
            ValueError: if it is otherwise.
        """
        for i, calls in self._calls.items():
            if calls != self.done + (i <= self.first):
                refuse(i)

    def call_ended(self) -> None:
        """The last memory has taken a call: nothing of before it is needed."""
        self._read.clear()
        self._before.clear()

    def check(self) -> None:
        """Between two calls: all have read the same ones.

        Raises:
            ValueError: if one failed on its way.
        """
        for i, calls in self._calls.items():
            if calls != self.done:
                refuse(i)

    def check_crop(self, removed: int, length: int) -> None:
        """Before tokens are taken back.

        Args:
            removed: how many columns.
            length: columns that stay.

        Raises:
            RuntimeError: if a layer cannot do that.
        """
        for i, layer in self.layers.items():
            if any(layer.is_recurrent_states_initialized.values()):
                raise RuntimeError(
                    f"crop: layer {i} keeps a recurrent state, from which no token can be taken "
                    "back; save or deepcopy the cache before the tokens come in"
                )
            for number, state in layer.conv_states.items():
                if state is None:
                    continue
                held = state.shape[-1] - removed
                if held < min(layer.conv_kernel_size[number], length):
                    raise RuntimeError(
                        f"crop: layer {i} has dropped what it would need; call "
                        "cache.activate_past_recording() before the tokens come in"
                    )

    def crop(self, removed: int) -> None:
        """Forget the newest tokens, after ``check_crop``; with 0 only what was recorded."""
        for layer in self.layers.values():
            for number, state in layer.conv_states.items():
                if state is not None:
                    layer.conv_states[number] = _last(layer, number, removed)

    def record(self, recording: bool) -> None:
        """Begin or end to keep what ``crop`` needs."""
        if not recording:
            self.crop(0)
        for layer in self.layers.values():
            layer.record_past = recording

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row ``rows[i]``."""
        for layer in self.layers.values():
            if layer.device is not None:
                layer.reorder_cache(rows)

    @property
    def num_bytes(self) -> int:
        """Of all states; a full cache has the same."""
        return sum(tensor.nbytes for _, _, _, tensor in self._tensors())

    # Files ---------------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[int, str, int, Tensor]]:
        for i, layer in self.layers.items():
            for name in ("conv_states", "recurrent_states"):
                for number, tensor in getattr(layer, name).items():
                    if tensor is not None:
                        yield i, name, number, tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """States by name, without what is only recorded."""
        tensors = {}
        for i, name, number, tensor in self._tensors():
            if name == "conv_states":
                tensor = _last(self.layers[i], number)
            tensors[f"{i}.{name}.{number}"] = tensor
        return tensors

    def fill(self, layer_idx: int, own: dict[str, Tensor]) -> int:
        """Put what a file has into a layer; the size of the batch.

        Raises:
            ValueError: if it cannot be a layer's.
        """
        layer, sizes = self.layers[layer_idx], set()
        for name, tensor in own.items():
            kind, _, number = name.partition(".")
            if kind not in ("conv_states", "recurrent_states") or not number.isdigit():
                raise ValueError(f"unknown tensors ['{layer_idx}.{name}']")
            if not 0 <= int(number) < layer.number_of_states or not tensor.dim():
                raise ValueError(f"{name} must be a state of layer {layer_idx}")
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} must be finite")
            layer.lazy_initialization(**{kind: tensor, "state_idx": int(number)})
            getattr(layer, kind)[int(number)].copy_(tensor)
            layer.has_previous_state[int(number)] = True
            sizes.add(tensor.shape[0])
        if len(sizes) != 1:
            raise ValueError(f"the states of layer {layer_idx} must have the same batch")
        self._calls[layer_idx] = self.done = 1
        return sizes.pop()


class RecurrentCache(Cache):
    """What recurrent layers ask of their cache; whatever it is, they are about to change."""

    session: Any

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a recurrent layer has read anything, by default the last one."""
        recurrent = self.session.recurrent
        if layer_idx in recurrent.layers:
            recurrent.asks(layer_idx)
        result: bool = recurrent.cache.has_previous_state(layer_idx, *args, **kwargs)
        return result

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """What the convolution of a recurrent layer has seen last."""
        self.session.recurrent.reads(layer_idx, "get_conv_state", state_idx)
        return self.session.recurrent.cache.get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """The state of a recurrent layer."""
        self.session.recurrent.reads(layer_idx, "get_recurrent_state", state_idx)
        return self.session.recurrent.cache.get_recurrent_state(layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: Any, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Any:
        """New columns for the convolution of a recurrent layer."""
        recurrent = self.session.recurrent
        recurrent.reads(layer_idx, "update_conv_state", state_idx)
        return recurrent.cache.update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Any, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Any:
        """The new state of a recurrent layer."""
        recurrent = self.session.recurrent
        recurrent.reads(layer_idx, "update_recurrent_state", state_idx)
        return recurrent.cache.update_recurrent_state(
            recurrent_states, layer_idx, state_idx, **kwargs
        )


def _last(layer: Any, number: int, removed: int = 0) -> Tensor:
    """The columns that a convolution goes on from, without the newest ``removed``."""
    state, width = layer.conv_states[number], layer.conv_kernel_size[number]
    stop = state.shape[-1] - removed
    start = max(stop - width, 0)
    # Before the text there are zeros, which are not recorded.
    return F.pad(state[..., start:stop], (width - (stop - start), 0))


def _states(layer: Any) -> dict[str, Any]:
    """A copy of everything that a layer knows of its text."""
    return {
        name: {n: t.clone() if isinstance(t, Tensor) else t for n, t in value.items()}
        for name, value in vars(layer).items()
        if isinstance(value, dict)
    }


def _leave_inference_mode(layer: Any) -> None:
    """What was made in inference mode could not be written to outside."""
    for states in (layer.conv_states, layer.recurrent_states):
        for number, state in states.items():
            if state is not None and state.is_inference() and not torch.is_inference_mode_enabled():
                states[number] = state.clone()


def refuse(layer_idx: int, cause: Exception | None = None) -> NoReturn:
    """Raise what a cache says that a failed call left between two states."""
    raise ValueError(
        f"NAMMCache: a forward pass was interrupted or failed, and layer {layer_idx} cannot go "
        "back behind it; start again with cache.reset()"
    ) from cause
