"""The memory of a model as a transformers ``Cache``.

``NAMMCache`` holds a ``NAMMLayer`` for every full-attention layer and transformers' own layer for
every sliding one. Three facts carry the drop-in:

* ``update`` returns the new keys and values only, and ``get_mask_sizes`` says so, so transformers'
  mask code works unmodified and never meets the difference between tokens seen and tokens kept;
* ``get_seq_length`` is the number of columns seen, never of tokens kept, so position ids stay;
* calls are cut at updates inside the layer, so any way of feeding a sequence gives one result.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from . import attention, cache_files
from .policy import Policy
from .ragged import Ledger, Planner, RaggedKV
from .report import LayerReport, Report

Spans = tuple[tuple[int, int], ...]


def cache_keyword(model: nn.Module) -> str:
    """The argument that hands a cache to ``model``: "cache", before transformers 5.24
    "past_key_values"."""
    known = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


class _Session:
    """What the layers of one cache share. Layers refer to it and not to the cache: without a
    reference cycle, dropping a cache frees its memory at once."""

    def __init__(
        self, config: PreTrainedConfig, policy: Policy, param_index: Tensor | None, first: int
    ) -> None:
        self.config = config
        self.policy = policy
        self.param_index = param_index
        self.first = first  # the first layer with a memory: it sees every call before the others
        self.ledger = Ledger()
        self.model: weakref.ref[nn.Module] | None = None
        self.clear()

    def clear(self) -> None:
        self.planner = Planner(self.policy.n_up)
        self.padded = 0  # columns after the current call
        self.past_mask: Tensor | None = None  # [B, padded], None if there was no padding yet
        self.spans: Spans | None = None  # real columns of the current call, None if all are

    def policy_on(self, device: torch.device) -> Policy:
        # ``to`` returns the policy itself where nothing has to move.
        return self.policy.to(device)

    def read_mask(self, mask: Tensor | None, padded: int, batch_size: int, width: int) -> None:
        """Take the real columns of each row from the mask of a call, once for all layers.

        Raises:
            ValueError: if the mask has another shape, changed for cached tokens, or has holes.
        """
        self.spans = None
        if mask is None:
            if self.past_mask is not None:
                raise ValueError(
                    "namm: attention_mask must not change for tokens already in the cache; they "
                    "were padded, now there is no mask"
                )
            return
        if mask.shape != (batch_size, padded + width):
            raise ValueError(
                f"namm: attention_mask must be [batch, tokens seen + new tokens] = "
                f"[{batch_size}, {padded + width}], got {list(mask.shape)}"
            )
        mask = mask.bool()
        past = self.past_mask
        if bool(mask.all()):
            changed = past is not None
        else:
            old = mask[:, :padded]
            changed = not (bool(old.all()) if past is None else torch.equal(old, past))
        if changed:
            raise ValueError("namm: attention_mask must not change for tokens already in the cache")
        new = mask[:, padded:]
        if not bool(new.all()):
            counts = new.sum(dim=1)
            first = new.int().argmax(dim=1)
            last = width - 1 - new.flip(1).int().argmax(dim=1)
            rows = torch.stack([first, counts, last]).T.tolist()
            for b, (f, n, last_column) in enumerate(rows):
                if n and last_column - f + 1 != n:
                    raise ValueError(
                        f"namm: attention_mask must have its ones side by side in each call, row "
                        f"{b} has holes"
                    )
            self.spans = tuple((f, n) for f, n, _ in rows)
        if past is not None or self.spans is not None:
            self.past_mask = mask.clone()  # compiled graphs use their buffers again

    def crop_mask(self, padded: int) -> None:
        if self.past_mask is not None:
            past = self.past_mask[:, :padded]
            self.past_mask = None if bool(past.all()) else past

    def select_mask(self, rows: Tensor) -> None:
        if self.past_mask is not None:
            self.past_mask = self.past_mask[rows.to(self.past_mask.device)]


class NAMMLayer(CacheLayerMixin):
    """One attention layer's memory, behind transformers' interface of a cache layer."""

    is_sliding = False
    is_compileable = False  # generate would otherwise build 4-D masks and compile on its own
    is_croppable = True
    supports_early_init = False

    def __init__(self, session: _Session, layer_idx: int) -> None:
        super().__init__()
        self.session = session
        self.layer_idx = layer_idx
        self.kv: RaggedKV | None = None
        self.padded = 0
        self.pending = False
        self.record_past = False
        self.handle = _register(self)

    # transformers' side --------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store is made by the first attention call, which knows the heads."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values to the attention function, which stores them.

        Raises:
            ValueError: if another attention implementation would get them, or if those of the
                last call never arrived.
        """
        # One configuration for all layers, and reading it is slow.
        if self.layer_idx == self.session.first:
            implementation = self.session.config._attn_implementation
            if implementation != attention.NAME:
                raise ValueError(
                    f"NAMMCache: the model's attn_implementation must be {attention.NAME!r}, got "
                    f"{implementation!r}; use namm_ext.apply(model, policy)"
                )
        if self.pending:
            raise ValueError(
                f"NAMMCache: layer {self.layer_idx} did not consume the tokens of the last call; "
                "the model changes keys between cache and attention or the call was interrupted"
            )
        self.pending = True
        setattr(key_states, attention.TAG, self)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what ``update`` returns: the new tokens, behind those seen."""
        return query_length, self.padded

    def get_seq_length(self) -> int:
        """Columns seen, padding included; never the number of tokens kept."""
        return self.padded

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def reset(self) -> None:
        """Forget everything."""
        if self.kv is not None:
            self.kv.release()
        self.kv = None
        self.padded = 0
        self.pending = False

    def activate_past_recording(self) -> None:
        """Keep what is needed to undo updates, until the next ``crop``."""
        self.record_past = True

    # The attention function's side ---------------------------------------------------------------

    def claim(self, module: nn.Module) -> None:
        """Check that this module's attention is the one the pending tokens are meant for.

        Raises:
            ValueError: for KV sharing between layers, or a cache of another model.
        """
        config = getattr(module, "config", self.session.config)
        if config is not self.session.config:
            raise ValueError(
                "NAMMCache: the cache was made for another model; make one with "
                "NAMMCache(model, policy)"
            )
        if not self.pending or getattr(module, "layer_idx", self.layer_idx) != self.layer_idx:
            raise ValueError(
                f"NAMMCache: the keys of layer {self.layer_idx} are used more than once; models "
                "that share keys and values between layers are not supported"
            )
        self.pending = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Store the new tokens and attend, ``[B, L, Hq, Dv]``; updates happen in here.

        Raises:
            ValueError: if another layer has seen other tokens, or the batch changed its size.
        """
        if self.kv is None:
            self.kv = self._make_store(q, k, v, scale)
        kv = self.kv
        if q.shape[0] != kv.batch_size:
            raise ValueError(
                f"NAMMCache: batch must have {kv.batch_size} rows as before, got {q.shape[0]}"
            )
        after = self.padded + q.shape[2]
        if self.session.first == self.layer_idx:
            self.session.read_mask(mask, self.padded, q.shape[0], q.shape[2])
            self.session.padded = after
        elif self.session.padded != after:
            raise ValueError(
                f"NAMMCache: layer {self.layer_idx} has seen {self.padded} tokens where "
                f"{self.session.padded - q.shape[2]} were expected; a forward pass was "
                "interrupted, start again with cache.reset()"
            )
        kv.recording = self.record_past
        pieces = self.session.planner(kv.seen, q.shape[2], self.session.spans, q.device)
        out = kv.forward(q, k, v, pieces)
        self.padded = after
        return out

    def _make_store(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> RaggedKV:
        index = self.session.param_index
        if index is not None and index.numel() != q.shape[0]:
            raise ValueError(
                f"NAMMCache: param_index must have one entry per batch row, {q.shape[0]} (beams "
                f"and returned sequences included), got {index.numel()}"
            )
        # Heads are counted here and not in the config: tensor parallelism splits them.
        heads = getattr(self.session.config, "num_key_value_heads", None)
        if heads is not None and k.shape[1] < heads and _couples_heads(self.session.policy):
            raise ValueError(
                f"NAMMCache: a process holds {k.shape[1]} of {heads} KV heads, so the policy must "
                "decide for each head by itself (no budget 'per_layer', no selection 'reference', "
                f"no mean over heads), got {self.session.policy!r}"
            )
        return RaggedKV(
            self.session.policy_on(q.device),
            batch_size=q.shape[0],
            num_kv_heads=k.shape[1],
            num_heads=q.shape[1],
            head_dim=q.shape[3],
            head_dim_v=v.shape[3],
            softmax_scale=scale,
            dtype=k.dtype,
            device=q.device,
            layer_idx=self.layer_idx,
            param_index=index,
            ledger=self.session.ledger,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NAMMLayer:
        new = copy.copy(self)
        memo[id(self)] = new
        new.session = copy.deepcopy(self.session, memo)
        new.kv = copy.deepcopy(self.kv, memo)
        new.handle = _register(new)
        return new


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
        >>> cache = NAMMCache(model, NAMM(NAMMConfig(n_up=16, cache_size=8)))
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
            from .patching import use_namm_attention

            use_namm_attention(model_or_config)
            config = decoder_config(model_or_config.config)
        else:
            config = decoder_config(model_or_config)
        types = layer_types(config)
        if param_index is not None:
            param_index = torch.as_tensor(param_index, dtype=torch.int32)
            if param_index.dim() != 1:
                raise ValueError(
                    f"NAMMCache: param_index must be 1-D, got shape {list(param_index.shape)}"
                )
        session = _Session(config, policy, param_index, types.index("full_attention"))
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
        cache_files.save(self, path)

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
        return cache_files.load(path, model, policy)

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


# Which models can have a memory ------------------------------------------------------------------


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration object that a model's decoder attention modules hold.

    Raises:
        ValueError: for encoder-decoders.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"NAMMCache: encoder-decoder models are not supported, got {config.model_type!r}"
        )
    decoder: PreTrainedConfig = config.get_text_config(decoder=True)
    return decoder


def layer_types(config: PreTrainedConfig) -> list[str]:
    """``"full_attention"`` or ``"sliding_attention"`` for every layer.

    Raises:
        ValueError: for a kind of layer or attention that a memory cannot serve; names it.
    """
    name = config.model_type
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(f"NAMMCache: multi-head latent attention is not supported, got {name!r}")
    for field in ("attn_logit_softcapping", "attn_logit_softcap"):
        if getattr(config, field, None) is not None:
            raise ValueError(
                f"NAMMCache: softcapped attention logits are not supported, got {name!r}"
            )
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise ValueError(
            f"NAMMCache: keys and values shared between layers are not supported, got {name!r}"
        )
    if getattr(config, "is_causal", True) is False:
        raise ValueError(f"NAMMCache: attention must be causal, got {name!r}")
    num_layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is None:
        sliding = getattr(config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * num_layers
    types = list(types)[:num_layers]
    for i, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                "NAMMCache: layers must have full or sliding attention, layer "
                f"{i} of {name!r} has {kind!r}"
            )
    if "full_attention" not in types:
        raise ValueError(
            f"NAMMCache: at least one layer must have full attention, in {name!r} all are sliding"
        )
    return types


def _couples_heads(policy: Policy) -> bool:
    settings = getattr(policy, "config", policy)
    return (
        getattr(settings, "budget", None) == "per_layer"
        or getattr(settings, "selection", None) == "reference"
        or getattr(policy, "heads", None) == "layer"
    )


# torch.compile -----------------------------------------------------------------------------------
#
# Traced code cannot follow the host's books, so a compiled layer is one opaque op. Its handle is
# a CPU tensor: an int would be baked into the graph and every new cache would recompile.

_LAYERS: weakref.WeakValueDictionary[int, NAMMLayer] = weakref.WeakValueDictionary()
_next_handle = 0


def _register(layer: NAMMLayer) -> Tensor:
    global _next_handle
    _next_handle += 1
    _LAYERS[_next_handle] = layer
    return torch.tensor(_next_handle)


@torch.library.custom_op("namm_ext::layer_forward", mutates_args={"handle"})
def layer_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    handle: Tensor,
    softmax_scale: float,
) -> Tensor:
    """``NAMMLayer.forward`` of the layer behind ``handle``, opaque to torch.compile."""
    layer = _LAYERS[int(handle)]
    return layer.forward(query, key, value, attention_mask, softmax_scale)


@layer_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    handle: Tensor,
    softmax_scale: float,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
