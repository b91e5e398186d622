"""The evolution loop: seeded batches, a population per forward pass, checkpoints, validation.

Every number that decides anything derives from ``EvolveConfig.seed`` and the generation, so a run
that was interrupted and resumed is bit for bit the run that was not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..budget import Budget
from ..cache import borrow
from ..cache.families import decoder_config
from ..config import NAMMConfig
from ..policy import NAMM, Policy, StatisticsCalibrator
from .evaluate import MAX_TOKENS, Context, Evaluation, by_length, read
from .fingerprint import hash_model, hash_values
from .imitate import ImitateConfig, imitate
from .problem import Problem, length_of, num_tokens_of
from .run_folder import FIT_FILE, STATE_FILE, RunFolder
from .search import DiagonalCMA


@dataclass(frozen=True)
class EvolveConfig:
    """How to search, whatever the problem.

    Attributes:
        namm: how the memory scores.
        budget: how much it keeps; a share is one of the length of a batch's longest context.
        generations: how many to run.
        popsize: candidates per generation.
        sigma0: initial step size of CMA-ES.
        seed: of the search and of the training batches.
        validate_every: generations between two validations of the mean.
        imitation: how to fit the start of the search by gradient (:func:`imitate`); None starts at
            zero, where a memory keeps the newest tokens.
    """

    namm: NAMMConfig = field(
        default_factory=lambda: NAMMConfig(
            n_up=64,
            ema_coeff=0.9995,
            feature_transform="log",
        )
    )
    budget: Budget = field(default_factory=lambda: Budget(0.25, scope="per_layer", sink_tokens=4))
    generations: int = 100
    popsize: int = 16
    sigma0: float = 0.065
    seed: int = 0
    validate_every: int = 10
    imitation: ImitateConfig | None = None

    def __post_init__(self) -> None:
        for name, least in (
            *(("generations", 1), ("popsize", 2), ("seed", 0)),
            ("validate_every", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"EvolveConfig: {name} must be at least {least}, got {value}")
        if not 0 < self.sigma0 < np.inf:
            raise ValueError(f"EvolveConfig: sigma0 must be positive, got {self.sigma0}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class EvolveResult:
    """What an evolution found.

    Attributes:
        policy: the mean that was best on validation.
        generation: when it was.
        log: one record per generation, as in the log file, and one for a start that is not zero.
    """

    policy: NAMM
    generation: int
    log: list[dict[str, Any]]


def calibrate_statistics(
    model: Any, config: NAMMConfig, contexts: Sequence[Context]
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the spectral features over a pass in which nothing is evicted.

    Args:
        contexts: what to read; those of one length are read together.

    Returns:
        ``mean [17]`` and ``var [17]``, float32 (spec section 4).
    """
    calibrator = StatisticsCalibrator(config)
    with borrow(model):
        for length, members in by_length(contexts).items():
            ids = torch.tensor([contexts[i].input_ids for i in members], device=model.device)
            for rows in ids.split(max(1, MAX_TOKENS // length)):
                read(model, calibrator, rows)
    return calibrator.mean, calibrator.var


def evolve(
    model: Any,
    problem: Problem,
    config: EvolveConfig,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    x0: Tensor | None = None,
    policy_of: Callable[[Tensor], Policy] | None = None,
    on_imitation: Callable[[dict[str, Any]], None] = lambda _: None,
    on_generation: Callable[[dict[str, Any]], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvolveResult:
    """Evolve a memory for ``model`` and keep the one that validates best.

    A run whose ``output_dir`` holds a state is resumed from it, also within the fit of its start.
    ``KeyboardInterrupt`` at any moment loses at most the generation, or the step of the fit, under
    way.

    Args:
        model: a causal language model of transformers.
        problem: what to read, and what is good: `RecordProblem`, `TextProblem`, `JsonlProblem` or
            one's own `Problem`.
        config: how to search.
        output_dir: where state, log and policy go; None keeps everything in memory.
        x0: ``[n]`` initial mean; None takes what ``config.imitation`` says.
        policy_of: makes the memory of candidates ``[P, n]`` float32, or of one ``[n]``, so that
            something else than the scorer can be evolved; needs ``x0``, and n is its size. None is
            the `NAMM` of ``config.namm`` with statistics of the problem's ``calibration_batch``.
        on_imitation: called while the start is fitted, as ``on_step`` of :func:`imitate`.
        on_generation: called with the log record of each generation.
        should_stop: asked before each generation.

    Returns:
        EvolveResult: the best policy, also saved under ``output_dir / "policy"``.

    Raises:
        ValueError: if ``output_dir`` holds a run of something else or a damaged state, settings do
            not fit the model or the problem, or a fitness is not finite.

    Example:
        `TextProblem` has one of ten lines.
    """
    _check(model, problem, config, x0, policy_of)
    with nullcontext() if output_dir is None else RunFolder.open(output_dir) as folder:
        run = _Run(model, problem, config, folder, x0, policy_of)
        run.start(on_imitation)
        with borrow(model):
            run.validate_start()
            while run.search.generation < config.generations and not should_stop():
                on_generation(run.step())
            return run.result()


def _check(
    model: Any,
    problem: Problem,
    config: EvolveConfig,
    x0: Tensor | None,
    policy_of: Callable[[Tensor], Policy] | None,
) -> None:
    """What can be known to be wrong is said before anything is read."""
    if policy_of is not None and (x0 is None or config.imitation is not None):
        raise ValueError("evolve: policy_of needs an x0, and no imitation, which fits a NAMM")
    if x0 is not None:
        n = x0.shape[0] if policy_of is not None and x0.ndim == 1 else config.namm.num_params
        if tuple(x0.shape) != (n,) or not bool(x0.isfinite().all()):
            raise ValueError(f"evolve: x0 must be [{n}] and finite, got {list(x0.shape)}")
    shortest = min(problem.context_lengths)
    if shortest < 2 * config.namm.n_up:
        raise ValueError(
            f"evolve: contexts must have at least 2 * n_up = {2 * config.namm.n_up} tokens, "
            f"got {shortest}"
        )
    num_layers = model.config.num_hidden_layers
    weights = config.imitation.layer_weights if config.imitation else None
    for name, values in (("layer_shares", config.budget.layer_shares), ("layer_weights", weights)):
        if values is not None and len(values) != num_layers:
            raise ValueError(
                f"evolve: {name} must have {num_layers} entries, one per layer, got {values}"
            )


class _Run:
    """An evolution under way: the search, what was best so far, and their files."""

    def __init__(
        self,
        model: Any,
        problem: Problem,
        config: EvolveConfig,
        folder: RunFolder | None,
        x0: Tensor | None,
        policy_of: Callable[[Tensor], Policy] | None,
    ) -> None:
        self.model, self.problem, self.config, self.folder = model, problem, config, folder
        self.x0, self.policy_of = x0, policy_of
        self.log: list[dict[str, Any]] = []
        self.mean, self.var = torch.zeros(17), torch.ones(17)
        self.validation = problem.validation_batches()

    def start(self, on_imitation: Callable[[dict[str, Any]], None]) -> None:
        """Begin, or go on where the folder's run was."""
        if self.folder is not None:
            self.folder.check(self._description())
            state = self.folder.load(STATE_FILE, _STATE_KEYS)
            if state is not None:
                self._resume(state, self.folder.path / STATE_FILE)
                return
        x0 = self.x0
        if self.policy_of is None:
            x0 = self._fitted_start(on_imitation)
        assert x0 is not None  # `_check`
        self._begin(x0.detach().cpu().double().numpy())
        if self.folder is not None:
            self.folder.rewrite_log([])
            self._save()
            self.folder.remove(FIT_FILE)

    def _description(self) -> dict[str, Any]:
        """What may not differ when a run goes on."""
        settings = self.config.to_dict()
        del settings["generations"]
        return {
            **settings,
            "x0": None if self.x0 is None else hash_values(self.x0.double().tolist()),
            **({} if self.policy_of is None else {"start": self._start_fingerprint()}),
            "problem": self.problem.settings(),
            "fingerprint": {"model": hash_model(self.model), **self.problem.fingerprint()},
        }

    def _start_fingerprint(self) -> str:
        """What is evolved may be a part of a memory only; the others may not change either."""
        assert self.policy_of is not None
        assert self.x0 is not None
        return self.policy_of(self.x0.float()).fingerprint()

    def _fitted_start(self, on_imitation: Callable[[dict[str, Any]], None]) -> Tensor:
        """Statistics, and the start that the configuration asks for."""
        state = None if self.folder is None else self.folder.load(FIT_FILE, _FIT_KEYS)
        if state is None:
            batch = self.problem.calibration_batch(self.config.seed)
            self.mean, self.var = calibrate_statistics(self.model, self.config.namm, batch)
            self._save_fit({})
        else:
            self.mean = torch.from_numpy(state["feature_mean"])
            self.var = torch.from_numpy(state["feature_var"])
        if self.x0 is not None:
            return self.x0
        if self.config.imitation is None:
            return torch.zeros(self.config.namm.num_params)
        return imitate(
            *(self.model, self.problem, self.config.namm, self.config.imitation),
            *(self.mean, self.var),
            budget=self.config.budget,
            seed=self.config.seed,
            state=state if state is not None and "params" in state else None,
            on_step=on_imitation,
            on_state=self._save_fit,
        )

    def _save_fit(self, state: Mapping[str, Any]) -> None:
        if self.folder is not None:
            statistics = {"feature_mean": self.mean.numpy(), "feature_var": self.var.numpy()}
            self.folder.save(FIT_FILE, {**state, **statistics})

    def _begin(self, x0: NDArray[np.float64]) -> None:
        config = self.config
        self.first = x0
        self.search = DiagonalCMA(x0, config.sigma0, config.popsize, config.seed)
        self.best_params, self.best_value, self.best_generation = x0, -np.inf, 0

    def policy(self, params: NDArray[np.float64] | None = None, length: int | None = None) -> Any:
        """With the budget of a length, of the first validation batch's by default; the best one
        by default."""
        length = length_of(self.validation[0]) if length is None else length
        vectors = torch.from_numpy(self.best_params if params is None else params).float()
        if self.policy_of is not None:
            policy: Any = self.policy_of(vectors)
        else:
            policy = NAMM(self.config.namm, vectors, self.mean, self.var)
        if isinstance(policy, NAMM):
            policy = policy.with_made_for(decoder_config(self.model.config))
        return policy.with_budget(self.config.budget.of_context(length))

    def step(self) -> dict[str, Any]:
        """One generation: ask, evaluate, tell, maybe validate, save."""
        config, generation = self.config, self.search.generation
        began = time.perf_counter()
        batch = self.problem.training_batch(config.seed, generation)
        length = length_of(batch)
        policy = self.policy(self.search.ask(), length)
        result = self.problem.fitness(self.model, policy, batch, config.popsize)
        fitness = result.fitness()
        try:
            self.search.tell(fitness.tolist())
        except ValueError as error:
            raise ValueError(f"evolve: generation {generation + 1}: {error}") from error
        best = int(fitness.argmax())
        name = self.problem.metric
        shown = result.metrics[name]
        record = {
            "generation": self.search.generation,
            "length": length,
            "fitness_best": float(fitness.max()),
            "fitness_mean": float(fitness.mean()),
            f"{name}_best": float(shown[best].mean()),
            f"{name}_mean": float(shown.mean()),
            "kept": float(result.kept.mean()),
            "sigma": self.search.sigma,
            "tokens": num_tokens_of(batch) * config.popsize,
        }
        if self.search.generation % config.validate_every == 0:
            record |= self._validate()
        record["seconds"] = round(time.perf_counter() - began, 3)
        self._note(record)
        return record

    def validate_start(self) -> None:
        """A start that stands for a memory may be the best there will be; it is generation 0 of
        the log. A scorer of zeros is none."""
        if not self.log and (self.policy_of is not None or self.first.any()):
            self._note({"generation": 0, **self._validate()})

    def _note(self, record: dict[str, Any]) -> None:
        self._check_finite(record)
        self.log.append(record)
        self._save()
        if self.folder is not None:
            self.folder.append_to_log(record)

    def _validate(self) -> dict[str, float]:
        mean = self.search.mean.copy()
        results = [
            self.problem.fitness(self.model, self.policy(mean, length_of(batch)), batch)
            for batch in self.validation
        ]
        result = Evaluation.join(results)
        value = float(result.fitness())
        metrics = {f"validation_{k}": float(v.mean()) for k, v in result.metrics.items()}
        record = {"validation_fitness": value, **metrics}
        self._check_finite(record)
        if value > self.best_value:
            self.best_params, self.best_value = mean, value
            self.best_generation = self.search.generation
            self._save_policy()
        return record

    def _check_finite(self, record: Mapping[str, float]) -> None:
        """JSON has no word for what is not a number, and a search has no use for it."""
        for name, value in record.items():
            if not np.isfinite(value):
                raise ValueError(
                    f"evolve: {name} must be finite, got {value} in generation "
                    f"{self.search.generation}"
                )

    def result(self) -> EvolveResult:
        """The best of the validated means; the current one if none was."""
        if self.best_value == -np.inf and self.search.generation:
            self._validate()
        self._save_policy()
        return EvolveResult(self.policy(), self.best_generation, self.log)

    def _save_policy(self) -> None:
        if self.folder is not None:
            self.policy().save_pretrained(self.folder.policy)

    def _save(self) -> None:
        if self.folder is not None:
            state = {
                "x0": self.first,
                "history": np.array(self.search.history),
                "search_mean": self.search.mean,
                "best_params": self.best_params,
                "best_value": np.array(self.best_value),
                "best_generation": np.array(self.best_generation),
                "feature_mean": self.mean.numpy(),
                "feature_var": self.var.numpy(),
                "log": np.array(json.dumps(self.log, allow_nan=False)),
            }
            self.folder.save(STATE_FILE, state)

    def _resume(self, state: Mapping[str, NDArray[Any]], path: Path) -> None:
        self._begin(state["x0"])
        self.log = json.loads(str(state["log"]))
        self.best_params = state["best_params"]
        self.best_value = float(state["best_value"])
        self.best_generation = int(state["best_generation"])
        self.mean = torch.from_numpy(state["feature_mean"])
        self.var = torch.from_numpy(state["feature_var"])
        self.search.replay(state["history"].tolist())
        if not np.array_equal(self.search.mean, state["search_mean"]):
            raise ValueError(
                f"evolve: {path} does not replay to the mean it holds; it was written with other "
                "versions of numpy or pycma: start a new run with its mean as x0"
            )
        assert self.folder is not None
        self.folder.rewrite_log(self.log)
        self.folder.remove(FIT_FILE)


_FIT_KEYS = ("feature_mean", "feature_var")
_STATE_KEYS = (
    *("x0", "history", "search_mean", "best_params", "best_value", "best_generation"),
    *("feature_mean", "feature_var", "log"),
)
