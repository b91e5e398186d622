"""One attention layer's memory, behind transformers' interface of a cache layer."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ..ragged import RaggedKV, Replay
from ..transfer import waits
from . import compiled
from .latent import num_memory_heads, wait_for_attention
from .recurrent import refuse
from .session import Session

#: ``attn_implementation`` under which both functions are registered. transformers looks for
#: "flash", "sdpa", "flex_attention" and "/" inside such names, so it must contain none of them.
NAME = "namm"
#: Attribute of new keys that leads to their layer.
TAG = "_namm_layer"


class NAMMLayer(CacheLayerMixin):
    """One attention layer's memory, behind transformers' interface of a cache layer."""

    is_sliding = False
    is_compileable = False  # generate would otherwise build 4-D masks and compile on its own
    is_croppable = True
    supports_early_init = False

    def __init__(self, session: Session, layer_idx: int, readers: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.readers = readers  # layers that read these keys and values and have none of their own
        self.replay: Replay | None = None  # what the current call saw, until all have read it
        self.session = session
        self.layer_idx = layer_idx
        self.kv: RaggedKV | None = None
        self.padded = 0  # columns this layer has taken, those of a call that failed included
        self.pending = False
        self.latents: tuple[Tensor, Tensor] | None = None  # of the call, if they are no keys yet
        self.handle = compiled.register(self)

    # transformers' side --------------------------------------------------------------------------

    @property
    def record_past(self) -> bool:
        """Whether updates can be undone; transformers reads and clears it."""
        return self.session.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.session.recording = value

    # Where attention and a recurrent state share a layer, it reads them here before 5.24.

    @property
    def conv_states(self) -> Any:
        """What the convolution of the same layer has seen last."""
        return self.session.recurrent.layers[self.layer_idx].conv_states

    @property
    def recurrent_states(self) -> Any:
        """The recurrent states of the same layer."""
        return self.session.recurrent.layers[self.layer_idx].recurrent_states

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
            if implementation != NAME:
                raise ValueError(
                    f"NAMMCache: the model's attn_implementation must be {NAME!r}, got "
                    f"{implementation!r}; use namm_ext.apply(model, policy)"
                )
        if self.pending:
            raise ValueError(
                f"NAMMCache: layer {self.layer_idx} did not consume the tokens of the last call; "
                "the model changes keys between cache and attention, or the call was interrupted: "
                "start again with cache.reset()"
            )
        self.pending = True
        rank = getattr(self.session.config, "kv_lora_rank", None)
        if rank is not None and key_states.shape[1] == 1 and key_states.shape[3] == rank:
            self.latents = key_states, value_states
            wait_for_attention(self)
        setattr(key_states, TAG, self)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what ``update`` returns: the new tokens, behind those seen."""
        return query_length, self.session.length

    def get_seq_length(self) -> int:
        """Columns seen by all layers, padding included; never the number of tokens kept."""
        return self.session.length

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
        self.replay = self.latents = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: rows have a mask and parameters that the layers share.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "NAMMCache: rows must be reordered in all layers at once, use cache.reorder_cache, got "
            f"a call on layer {self.layer_idx}"
        )

    def settle(self) -> None:
        """Go back to what all layers have seen, if a call failed after this one, and to where
        the rows' texts ended.

        Raises:
            ValueError: if an update came in between that was not recorded.
        """
        if self.padded == self.session.length:
            pass
        elif self.session.length == 0:
            self.reset()
        elif self.kv is None or self.padded < self.session.length:
            refuse(self.layer_idx)
        else:
            try:
                self.kv.roll_back()
            except RuntimeError as error:
                refuse(self.layer_idx, error)
            self.padded = self.session.length
        ends = self.session.ends
        if self.kv is not None and ends is not None and self.kv.seen != ends:
            self.kv.end_rows(ends)

    # The attention function's side ---------------------------------------------------------------

    def claim(self, module: nn.Module) -> int | None:
        """Check that this module's attention is the one the pending tokens are meant for.

        Returns:
            The module's layer, if it only reads what this one remembers.

        Raises:
            ValueError: for another layer, or a cache of another model.
        """
        config = getattr(module, "config", self.session.config)
        if config is not self.session.config:
            raise ValueError(
                "NAMMCache: the cache was made for another model; make one with "
                "NAMMCache(model, policy)"
            )
        layer_idx = getattr(module, "layer_idx", self.layer_idx)
        if layer_idx in self.readers and not self.pending and self.replay is not None:
            return int(layer_idx)
        if not self.pending or layer_idx != self.layer_idx:
            raise ValueError(
                f"NAMMCache: the keys of layer {self.layer_idx} are used more than once, by layer "
                f"{layer_idx}, and the model's configuration says nothing of it"
            )
        self.pending = False
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        sink_logits: Tensor | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Store the new tokens and attend, ``[B, L, Hq, Dv]``; updates happen in here.

        Raises:
            ValueError: if another layer has seen other tokens, or the batch changed its size.
        """
        session, width = self.session, q.shape[2]
        if self.layer_idx == session.first:
            if self.kv is not None and session.length and q.shape[0] != self.kv.batch_size:
                raise ValueError(
                    f"NAMMCache: batch must have {self.kv.batch_size} rows as before, got "
                    f"{q.shape[0]}"
                )
            session.settle_length()
            self.settle()
            seen = (0,) * q.shape[0] if self.kv is None else self.kv.seen
            session.begin(mask, seen, width)
        elif session.target != session.length + width:
            refuse(self.layer_idx)
        self.settle()
        if self.kv is None:
            self.kv = self._make_store(q, k, v, scale, softcap)
            self.is_initialized = True
        kv = self.kv
        kv.recording, kv.evicts = session.recording, session.evicts
        if not kv.recording:
            kv.forget_past()
        pieces = session.planner(kv.seen, width, session.runs, q.device)
        kv.mark()
        self.padded = session.target
        together = waits(q.device)
        replay = None
        if self.readers:
            if kv.overdue is not None:
                kv.update(kv.overdue)
            replay = Replay(kv.seen, kv.lengths)
        out = kv.forward(q, k, v, pieces, sink_logits, leave_last=together, replay=replay)
        self.replay = replay
        if together:
            session.stores.append(kv)
        if self.layer_idx == session.first:
            session.started()
        if self.layer_idx == session.last:
            session.commit()
        return out

    def read(
        self,
        reader: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sink_logits: Tensor | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Attention of a layer that has no keys of its own: it sees what this one's queries saw.

        Its queries do not count as attention received.

        Args:
            reader: the layer, one of ``readers``.
            q: ``[B, Hq, L', D]``, of the newest L' columns of the call. k, v: the call's.

        Returns:
            ``[B, L', Hq, Dv]``.
        """
        assert self.kv is not None
        assert self.replay is not None
        out = self.replay.attend(
            q, k, v, softmax_scale=scale, softcap=softcap, sink_logits=sink_logits
        )
        with self.kv.ledger.holding(self.replay.nbytes):
            pass  # the moment at which most is held
        if reader == self.readers[-1]:
            self.replay = None
        if reader == self.session.last:
            self.session.commit()
        return out

    def advance(self, seen: tuple[int, ...]) -> None:
        """A token came in for every row, and the device knows already.

        Args:
            seen: ``[B]`` tokens of each row with it.
        """
        assert self.kv is not None
        self.kv.mark()
        self.kv.seen = seen
        self.padded += 1

    def _make_store(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float
    ) -> RaggedKV:
        index = self.session.param_index
        if index is not None and index.numel() != q.shape[0]:
            raise ValueError(
                f"NAMMCache: param_index must have one entry per batch row, {q.shape[0]} (beams "
                f"and returned sequences included), got {index.numel()}"
            )
        # Heads are counted here and not in the config: tensor parallelism splits them.
        heads = num_memory_heads(self.session.config)
        if heads is not None and k.shape[1] < heads and self.session.policy.couples_heads:
            raise ValueError(
                f"NAMMCache: a process holds {k.shape[1]} of {heads} KV heads, so the policy must "
                "decide for each head by itself (scope 'per_head', no selection 'original', no "
                f"mean over heads), got {self.session.policy!r}"
            )
        return RaggedKV(
            self.session.policy_on(q.device),
            batch_size=q.shape[0],
            num_kv_heads=k.shape[1],
            num_heads=q.shape[1],
            head_dim=q.shape[3],
            head_dim_v=v.shape[3],
            softmax_scale=scale,
            softcap=softcap,
            dtype=k.dtype,
            device=q.device,
            layer_idx=self.layer_idx,
            param_index=index,
            ledger=self.session.ledger,
            num_layers=self.session.num_memories,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NAMMLayer:
        new = copy.copy(self)
        memo[id(self)] = new
        new.session = copy.deepcopy(self.session, memo)
        new.kv = copy.deepcopy(self.kv, memo)
        new.replay = new.latents = None
        new.handle = compiled.register(new)
        return new
