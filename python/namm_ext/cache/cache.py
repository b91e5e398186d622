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
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from ..policy import Policy
from ..report import LayerReport, Report
from . import files
from .families import decoder_config, layer_types
from .layer import NAMMLayer
from .session import Session
from .switching import use_namm_attention


class NAMMCache(Cache):
    """KV cache whose content a policy decides; pass it as ``past_key_values``.

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
        if isinstance(model_or_config, nn.Module):
            use_namm_attention(model_or_config)
            config = decoder_config(model_or_config.config)
        else:
            config = decoder_config(model_or_config)
        types = layer_types(config)
        if policy.calibration is not None:
            policy.calibration.check_model(len(types), getattr(config, "num_key_value_heads", None))
        if param_index is not None:
            param_index = torch.as_tensor(param_index, dtype=torch.int32)
            if param_index.dim() != 1:
                raise ValueError(
                    f"NAMMCache: param_index must be 1-D, got shape {list(param_index.shape)}"
                )
        session = Session(config, policy, param_index, types.index("full_attention"))
        if isinstance(model_or_config, nn.Module):
            session.model = weakref.ref(model_or_config)
        layers: list[Any] = [
            NAMMLayer(session, i)
            if kind == "full_attention"
            else DynamicSlidingWindowLayer(sliding_window=config.sliding_window)
            for i, kind in enumerate(types)
        ]
        super().__init__(layers=layers)
        self.session = session

    @property
    def policy(self) -> Policy:
        """The policy that decides."""
        return self.session.policy

    @property
    def memory_layers(self) -> list[NAMMLayer]:
        """The layers with a memory, in order."""
        return [layer for layer in self.layers if isinstance(layer, NAMMLayer)]

    def memory_layer(self, layer_idx: int) -> NAMMLayer:
        """The memory of a layer. Raises TypeError if it has none."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, NAMMLayer):
            raise TypeError(f"NAMMCache: layer {layer_idx} has no memory, it is a sliding layer")
        return layer

    @property
    def sliding_layers(self) -> list[DynamicSlidingWindowLayer]:
        """transformers' own layers of a hybrid, in order."""
        return [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """-1: no limit (name before transformers 5.16)."""
        return -1

    def reset(self) -> None:
        """Forget everything; the next call starts a new sequence, of any batch size."""
        super().reset()
        self.session.clear()

    def activate_past_recording(self) -> None:
        """Let ``crop`` undo updates, until the next ``crop`` (128 tokens back at least)."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, exactly as if they had never come in.

        Args:
            tokens_to_remove: ``-n`` removes n columns, 0 only drops the recorded past; a positive
                number is the length to keep (transformers before 5.16).

        Raises:
            RuntimeError: if that undoes an update and the past was not recorded.
        """
        n = int(tokens_to_remove)
        memories = self.memory_layers
        length = memories[0].padded
        removed = max(length - n, 0) if n > 0 else -n
        target = length - removed
        if target < 0:
            raise ValueError(f"crop: cannot remove {removed} tokens, the cache has seen {length}")
        past = self.session.past_mask
        for layer in memories:
            excess = layer.padded - target
            if layer.kv is None or excess < 0:
                continue
            rows = [excess] * layer.kv.batch_size
            if past is not None:
                rows = past[:, target:].sum(dim=1).tolist()
            if excess:
                layer.kv.crop(rows)
            layer.kv.forget_past()
            layer.padded = target
            layer.pending = False
        for sliding in self.sliding_layers:
            sliding.crop(-removed)
        self.session.padded = target
        self.session.crop_mask(target)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes a copy of row ``beam_idx[i]``."""
        self._select_rows(beam_idx)
        for layer in self.sliding_layers:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        self._select_rows(torch.arange(self._batch_size()).repeat_interleave(repeats))
        for layer in self.sliding_layers:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._select_rows(torch.arange(self._batch_size())[indices.cpu()])
        for layer in self.sliding_layers:
            layer.batch_select_indices(indices)

    def _batch_size(self) -> int:
        kv = self.memory_layers[0].kv
        return 0 if kv is None else kv.batch_size

    def _select_rows(self, index: Tensor) -> None:
        rows = index.tolist()
        if rows == list(range(self._batch_size())):
            return
        for layer in self.memory_layers:
            if layer.kv is not None:
                layer.kv.select_rows(rows)
        if self.session.param_index is not None:
            self.session.param_index = self.session.param_index[index.cpu()]
        self.session.select_mask(index)

    def save(self, path: str | Path) -> None:
        """Write the memory to a safetensors file, to continue from it later.

        It holds what the memory holds: kept tokens, state and windows, and fingerprints of policy
        and model. The recorded past (``activate_past_recording``) is not saved.
        """
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
        cache = cls(model, policy, param_index=tensors.get("param_index"))
        files.fill(cache.session, cache.layers, model, metadata, tensors, path)
        return cache

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
        """``[B]`` tokens kept by the last update / tokens seen, over layers and heads of a row.

        From the host's books: no device synchronisation.
        """
        reports = [
            LayerReport.of(layer.kv, layer.layer_idx, layer.padded)
            for layer in self.memory_layers
            if layer.kv is not None
        ]
        kept = torch.tensor([[sum(row) for row in r.kept] for r in reports]).sum(dim=0)
        seen = torch.tensor([[n * len(r.kept[0]) for n in r.seen] for r in reports]).sum(dim=0)
        return kept / seen.clamp(min=1)

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
