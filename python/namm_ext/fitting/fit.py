"""The whole fit of a memory to a model: gate, scorer, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..budget import Budget
from ..config import NAMMConfig
from ..policy import NAMM
from .attention import AttentionFitConfig, fit_attention
from .calibrate import calibrate
from .checkpoint import Checkpoint
from .gate import PENALTY, GateFit, fit_gate
from .importance import Text


@dataclass(frozen=True)
class FitConfig:
    """How a memory is fitted.

    Attributes:
        namm: how it scores; the scorer "none" leaves the gate alone.
        gate: whether there is a gate; without one the memory is the universal part alone.
        budget: its budget.
        penalty: of the gate's ridge regression.
        attention: how the scorer is fitted.
        attention_texts: texts for the scorer, the first ones of those for the gate.
        calibration_texts: texts for the calibration, the last ones.
    """

    namm: NAMMConfig = field(
        default_factory=lambda: NAMMConfig(n_up=64, ema_coeff=0.999, feature_transform="log")
    )
    gate: bool = True
    budget: Budget = field(
        default_factory=lambda: Budget(0.25, scope="global", sink_tokens=4, recent_tokens=32)
    )
    penalty: float = PENALTY
    attention: AttentionFitConfig = field(default_factory=AttentionFitConfig)
    attention_texts: int = 16
    calibration_texts: int = 8

    def __post_init__(self) -> None:
        if not self.gate and self.namm.scorer == "none":
            raise ValueError("FitConfig: gate must be True with scorer 'none', got False")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Fit:
    """What :func:`fit` found.

    Attributes:
        policy: the memory.
        gate_alone: the same without its scorer, calibrated for itself; None if it has no scorer
            or no gate.
        gate: how good its gate is on texts it was not fitted to; None if there is none.
        losses: mean squared error of the scorer's last steps, one for each round.
    """

    policy: NAMM
    gate_alone: NAMM | None
    gate: GateFit | None
    losses: tuple[float, ...]

    def report(self) -> dict[str, Any]:
        """Figures as JSON has them."""
        values = {k: v for k, v in vars(self.gate).items() if k != "gate"} if self.gate else None
        return {"gate": values, "scorer_losses": list(self.losses)}


def fit(
    model: Any,
    texts: Sequence[Text],
    config: FitConfig | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[str, float], None] = lambda *_: None,
) -> Fit:
    """Fit a memory to a model: gate in closed form, scorer by gradient, calibration.

    Args:
        model: a causal language model of transformers.
        texts: what to read (:func:`training_texts`, or :func:`repeated` for texts of one's own).
        config: how.
        checkpoint: where the gate's fit goes on if it was interrupted.
        on_step: called with what is being done and the share of it that is done.

    Raises:
        ValueError: if there are fewer than two texts, or one is shorter than ``n_up`` tokens.

    Example:
        A memory for a model, from its own texts::

            texts = [repeated(tokenizer, tokenizer.encode(t)[:1024]) for t in documents]
            fit(model, texts).policy.save_pretrained("memory")
    """
    config = FitConfig() if config is None else config
    found = None
    if config.gate:
        found = fit_gate(
            model, texts, penalty=config.penalty, checkpoint=checkpoint,
            on_text=lambda n: on_step("gate", n / len(texts)),
        )  # fmt: skip
    calibration = texts[-config.calibration_texts :]

    def calibrated(policy: NAMM) -> NAMM:
        return calibrate(
            policy, model, calibration,
            on_text=lambda n: on_step("calibration", n / len(calibration)),
        )  # fmt: skip

    # What the scorer is fitted under: the gate alone, or offsets alone.
    if found is None:
        start = NAMM(config.namm, budget=config.budget)
    else:
        alone = config.namm.replace(scorer="none")
        start = NAMM(alone, budget=config.budget, gate=found.gate)
    start = calibrated(start)
    if config.namm.scorer == "none":
        return Fit(start, None, found, ())
    losses = [math.nan] * config.attention.rounds
    chosen = texts[: config.attention_texts]

    def scorer_step(round_: int, step: int, loss: float) -> None:
        losses[round_ - 1] = loss
        on_step(f"scorer, round {round_}", step / config.attention.steps)

    policy = fit_attention(
        NAMM(
            config.namm, budget=config.budget, gate=start.gate, calibration=start.calibration
        ),
        model, chosen, config.attention,
        on_text=lambda r, n: on_step(f"reading, round {r}", n / len(chosen)),
        on_step=scorer_step,
    )  # fmt: skip
    gate_alone = None if found is None else start
    return Fit(calibrated(policy), gate_alone, found, tuple(losses))
