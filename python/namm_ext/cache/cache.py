"""The cache itself: its layers, undo, rows of the batch, files and report."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..policy import Policy
from ..policy.origin import say_if_foreign
from ..ragged import lasting
from ..report import LayerReport, Report
from . import files
from .families import decoder_config, passes_use_cache, readers_of, stock_layers
from .latent import num_memory_heads
from .layer import NAMMLayer
from .recurrent import RecurrentCache, has_memory, recurrent_part, refuse
from .session import Session
from .switching import keep


class NAMMCache(RecurrentCache):
    """KV cache whose content a policy decides; pass it as ``cache``, which transformers before 5.24
    calls ``past_key_values``.

    Per layer and KV head it holds what the policy kept plus the tokens since the last update, in
    exactly sized tensors. It works with everything ``generate`` does on a dynamic cache: sampling,
    beams, assisted decoding, chunked prefill, several turns, ``deepcopy``, ``crop``, ``reset``.

    Args:
        model_or_config: the model that will use the cache, or the configuration object its
            attention modules hold. A model is switched to the ``"namm"`` attention, which without
            a ``NAMMCache`` is plain SDPA (``namm_ext.remove(model)`` switches back); with a
            configuration that is up to you.
        policy: a ``NAMM`` or one of ``namm_ext.baselines``.
        param_index: ``[B]`` integers, the parameter vector of a bank that each batch row uses.

    Raises:
        ValueError: if the model has a part that a memory cannot serve; names it.

    Example:
        >>> import transformers
        >>> from namm_ext import NAMM, NAMMConfig
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0)
        >>> model = transformers.LlamaForCausalLM(config).eval()
        >>> cache = NAMMCache(model, NAMM(NAMMConfig(n_up=16), budget=8))
        >>> text = torch.ones(1, 40, dtype=torch.long)
        >>> text = model.generate(text, past_key_values=cache, max_new_tokens=4)
        >>> cache.get_seq_length(), cache.report().tokens_kept, cache.report().tokens_live
        (43, 16, 38)
    """

    def __init__(
        self,
        model_or_config: PreTrainedModel | PreTrainedConfig,
        policy: Policy,
        *,
        param_index: Tensor | Sequence[int] | None = None,
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"NAMMCache: policy must be a Policy, got {type(policy).__name__}")
        if param_index is not None:
            param_index = torch.as_tensor(param_index, dtype=torch.int32)
            if param_index.dim() != 1:
                raise ValueError(
                    f"NAMMCache: param_index must be 1-D, got shape {list(param_index.shape)}"
                )
        given: Any = model_or_config
        model = given if isinstance(given, nn.Module) else None
        if model is not None:
            keep(given)
        config = decoder_config(given if model is None else given.config)
        layers = stock_layers(config)
        if policy.calibration is not None:
            policy.calibration.check_model(len(layers), num_memory_heads(config))
        say_if_foreign(policy, config)
        memories = [i for i, layer in enumerate(layers) if has_memory(layer)]
        states = {i: recurrent_part(layer) for i, layer in enumerate(layers)}
        readers = readers_of(config)
        session = Session(
            config, policy, param_index, memories,
            {i: x for i, x in enumerate(layers) if isinstance(x, DynamicSlidingWindowLayer)},
            {i: state for i, state in states.items() if state is not None},
            [reader for i in memories for reader in readers.get(i, ())],
        )  # fmt: skip
        if model is not None:
            session.model = weakref.ref(model)
            session.hears_use_cache = passes_use_cache(given)
        for i in memories:
            layers[i] = NAMMLayer(session, i, readers.get(i, ()))
        super().__init__(layers=layers)
        self.session = session

    @property
    def policy(self) -> Policy:
        """The policy that decides."""
        return self.session.policy

    @property
    def evicts(self) -> bool:
        """Whether updates forget tokens; True at first.

        Between two calls it may be set: after ``cache.evicts = False`` all tokens stay, and the
        first update after it is True again goes back to the budget. Files do not keep it.
        """
        return self.session.evicts

    @evicts.setter
    def evicts(self, value: bool) -> None:
        self.session.evicts = bool(value)

    @property
    def memory_layers(self) -> list[NAMMLayer]:
        """The layers with a memory, in order."""
        return [layer for layer in self.layers if isinstance(layer, NAMMLayer)]

    def memory_layer(self, layer_idx: int) -> NAMMLayer:
        """The memory of a layer. Raises TypeError if it has none."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, NAMMLayer):
            raise TypeError(
                f"NAMMCache: layer {layer_idx} has no memory, it is a {type(layer).__name__}"
            )
        return layer

    @property
    def sliding_layers(self) -> list[DynamicSlidingWindowLayer]:
        """transformers' own layers of a hybrid, in order."""
        return list(self.session.sliding.values())

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """-1: no limit (name before transformers 5.16)."""
        return -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that all layers have seen, padding included; never the number of tokens kept."""
        return self.session.seen_by_all()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of the keys that a layer's mask is for."""
        if self.session.sliding:
            self.session.settle_sliding()
        if self.session.recurrent.layers:
            self.session.recurrent.call_begins()
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand a layer its new keys and values; see ``NAMMLayer.update``."""
        if self.session.sliding:
            if layer_idx == 0:
                self.session.settle_sliding()
            self.session.remember(layer_idx)
        result: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return result

    @property
    def is_initialized(self) -> bool:
        """Whether every layer has taken tokens."""
        layers = (*self.memory_layers, *self.sliding_layers)
        return all(layer.is_initialized for layer in layers)

    def reset(self) -> None:
        """Forget everything; the next call starts a new sequence, of any batch size."""
        self.session.end_recording()
        super().reset()
        for layer in self.sliding_layers:  # versions before 5.24 leave zeros of the old length
            layer.keys = layer.values = None
            layer.is_initialized, layer.cumulative_length = False, 0
        self.session.clear()

    # Undo ----------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Let ``crop`` undo updates, 128 tokens back at least.

        It ends with ``end_past_recording``, with ``reset``, or when 128 calls came in a row and
        no ``crop``: nobody is drafting then.
        """
        self.session.start_recording()

    def end_past_recording(self) -> None:
        """Drop what was recorded; tokens that come in can still be cropped up to an update."""
        self.session.end_recording()
        for layer in self.memory_layers:
            if layer.kv is not None:
                layer.kv.forget_past()

    @property
    def is_recording(self) -> bool:
        """Whether ``crop`` can undo the updates of tokens that come in."""
        return self.session.recording

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, exactly as if they had never come in.

        All layers or, with an error, none.

        Args:
            tokens_to_remove: ``-n`` removes n columns, 0 only drops the recorded past; a positive
                number is the length to keep (transformers before 5.16).

        Raises:
            RuntimeError: if that undoes an update and the past was not recorded.
            ValueError: if there are not as many tokens.
        """
        self.settle()
        n, session = int(tokens_to_remove), self.session
        length = session.length
        removed = max(length - n, 0) if n > 0 else -n
        target = length - removed
        if target < 0:
            raise ValueError(f"crop: cannot remove {removed} tokens, the cache has seen {length}")
        memories = [layer for layer in self.memory_layers if layer.kv is not None]
        if removed:
            session.recurrent.check_crop(removed, target)
            for sliding in session.sliding.values():
                if not _can_crop(sliding, removed):
                    raise RuntimeError(
                        "crop: sliding layers have dropped tokens; call "
                        "cache.activate_past_recording() before the tokens come in"
                    )
            rows = None
            if session.past_mask is not None:
                rows = session.past_mask[:, target:].sum(dim=1).tolist()
            cropped = [
                (layer.kv, layer.kv.cropped(rows or [removed] * layer.kv.batch_size))
                for layer in memories
                if layer.kv is not None
            ]
            for kv, state in cropped:
                kv.restore(state)
        for layer in memories:
            assert layer.kv is not None
            layer.kv.forget_past()
            layer.padded = target
        for sliding in session.sliding.values():
            if sliding.is_initialized and (removed or sliding.record_past):
                sliding.crop(-removed)
        session.recurrent.crop(removed)
        session.cropped(target)

    def settle(self) -> None:
        """Bring every layer back to what all have seen, after a call that failed.

        Raises:
            ValueError: if one cannot go back.
        """
        session = self.session
        session.settle_length()
        session.settle_sliding()
        session.recurrent.check()
        for layer in self.memory_layers:
            if layer.pending:
                refuse(layer.layer_idx)
            layer.settle()
        session.ends = None

    # Rows of the batch ---------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes a copy of row ``beam_idx[i]``."""
        self._select_rows(beam_idx, "reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        if repeats < 1:
            raise ValueError(f"batch_repeat_interleave: repeats must be at least 1, got {repeats}")
        rows = torch.arange(self._batch_size())
        self._select_rows(rows.repeat_interleave(repeats), "batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch: ``[B]`` bool, or integers."""
        self._select_rows(indices, "batch_select_indices")

    def _batch_size(self) -> int:
        kv = self.memory_layers[0].kv
        return 0 if kv is None else kv.batch_size

    def _select_rows(self, indices: Any, what: str) -> None:
        """Rows as Python counts them, negative ones from the end.

        Raises:
            IndexError: if there is no such row, or no row is left.
        """
        self.settle()
        size = self._batch_size()
        if size == 0:
            return
        index: Any = torch.as_tensor(indices).cpu()
        if index.dtype == torch.bool and index.shape == (size,):
            index = index.nonzero().flatten()
        rows = index.tolist()
        if (
            index.dim() != 1
            or index.is_floating_point()
            or index.dtype == torch.bool
            or not rows
            or not all(-size <= row < size for row in rows)
        ):
            raise IndexError(
                f"{what}: rows must be a non-empty list of indices below {size}, or [{size}] "
                f"bool, got {index.dtype} {list(index.shape)}: {rows}"
            )
        rows = [row % size for row in rows]
        if rows == list(range(size)):
            return
        index = torch.tensor(rows)
        for layer in self.memory_layers:
            if layer.kv is not None:
                layer.kv.select_rows(rows)
        for sliding in self.session.sliding.values():
            sliding.reorder_cache(index)
        self.session.recurrent.reorder(index)
        if self.session.param_index is not None:
            self.session.param_index = self.session.param_index[index]
        self.session.select_mask(index)

    # Files and reports ---------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the memory to a safetensors file, to continue from it later.

        It holds what the memory holds: kept tokens, state and windows, and fingerprints of policy
        and model. The recorded past (``activate_past_recording``) is not saved.
        """
        self.settle()
        files.save(self.session, self.layers, path)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, policy: Policy) -> NAMMCache:
        """Read a memory that ``save`` wrote; generation continues as if it had not been away.

        Args:
            path: the file.
            model: the model that filled it; switched to "namm" attention as by ``NAMMCache``.
            policy: the policy that decided what it holds.

        Raises:
            ValueError: if the file is damaged or foreign, or of another policy or model.
        """
        metadata, tensors = files.read(Path(path))
        try:
            cache = cls(model.config, policy, param_index=tensors.get("param_index"))
        except ValueError as error:
            raise files.damaged(path, str(error)) from error
        files.fill(cache.session, cache.layers, model, metadata, tensors, path)
        keep(model)
        cache.session.model = weakref.ref(model)
        return cache

    @lasting
    def __deepcopy__(self, memo: dict[int, Any]) -> NAMMCache:
        # Config and policy are shared: the one is compared by identity, the other never changes.
        memo[id(self.session.config)] = self.session.config
        memo[id(self.session.policy)] = self.session.policy
        for layer in self.memory_layers:
            if layer.kv is not None:
                memo[id(layer.kv.policy)] = layer.kv.policy
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return new

    def kept_fraction_per_row(self) -> Tensor:
        """``[B]`` tokens kept by the last update / tokens seen up to it, over layers and heads of
        a row.

        From the host's books: no device synchronisation.
        """
        reports = [
            LayerReport.of(layer.kv, layer.layer_idx, layer.padded)
            for layer in self.memory_layers
            if layer.kv is not None
        ]
        kept, live = (
            torch.tensor([[sum(row) for row in rows] for rows in part]).sum(dim=0)
            for part in ([r.kept for r in reports], [r.live for r in reports])
        )
        seen = torch.tensor([[n * len(r.kept[0]) for n in r.seen] for r in reports]).sum(dim=0)
        return kept / (seen - live + kept).clamp(min=1)

    def report(self) -> Report:
        """What the memory holds now, measured on the live tensors.

        ``print`` shows a table; ``to_dict`` gives the numbers.
        """
        layers = []
        sliding = sliding_full = 0
        for layer in self.layers:
            if isinstance(layer, NAMMLayer) and layer.kv is not None:
                layers.append(LayerReport.of(layer.kv, layer.layer_idx, layer.padded))
            elif isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None:
                assert layer.values is not None
                held = layer.keys.nbytes + layer.values.nbytes
                sliding += held
                sliding_full += held // max(layer.keys.shape[-2], 1) * layer.get_seq_length()
        sliding += self.session.recurrent.num_bytes
        sliding_full += self.session.recurrent.num_bytes
        full = sum(layer.full_bytes for layer in layers) + sliding_full
        return Report(
            policy=type(self.policy).__name__,
            fingerprint=self.policy.fingerprint(),
            layers=tuple(layers),
            sliding_bytes=sliding,
            full_bytes=full,
            peak_kv_bytes=self.session.ledger.peak_kv,
            peak_memory_bytes=self.session.ledger.peak_memory,
            peak_bytes=self.session.ledger.peak,
        )


def _can_crop(layer: DynamicSlidingWindowLayer, removed: int) -> bool:
    """Whether a sliding layer still has the window that it had ``removed`` columns ago."""
    if layer.keys is None:
        return True
    wanted = min(layer.cumulative_length - removed, layer.sliding_window - 1)
    return layer.keys.shape[-2] - removed >= wanted
