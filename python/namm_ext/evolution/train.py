"""The evolution loop: seeded batches, a population per forward pass, checkpoints, validation.

Every number that decides anything derives from ``EvolveConfig.seed`` and the generation, so a run
that was interrupted and resumed is bit for bit the run that was not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import NAMMConfig
from ..patching import patch
from ..policy import NAMM, StatisticsCalibrator
from ..tasks import (
    EVOLUTION_FAMILIES,
    STATED_ONCE,
    TRAIN_SEED,
    VALIDATION_SEED,
    Example,
    RecordMix,
    make_mixed_batch,
)
from ..zoo import load_documents
from .evaluate import evaluate_policy, evaluate_population
from .imitate import ImitateConfig, imitate
from .search import DiagonalCMA

CONFIG_FILE, STATE_FILE, LOG_FILE, POLICY_DIR = "config.json", "state.npz", "log.jsonl", "policy"


@dataclass(frozen=True)
class EvolveConfig:
    """Everything an evolution depends on besides the model.

    Attributes:
        namm: of the memory; its ``cache_size`` is set per batch from ``keep_fraction``.
        generations: how many to run.
        popsize: candidates per generation.
        sigma0: initial step size of CMA-ES.
        seed: of the search and of the training batches.
        lengths: context lengths in tokens; generation g uses ``lengths[g % len(lengths)]``.
        num_examples: examples per generation, the same ones for all candidates.
        mixes: records hidden in one example; the examples of a batch take equal parts of each.
        families: task families of the training and validation examples.
        keep_fraction: budget of a context = this share of its tokens per head.
        text_weight: weight of the text log-likelihood beside the answers' in the fitness.
        validate_every: generations between two validations of the mean.
        validation_lengths: tokens of the validation examples: long contexts, because a memory that
            is best on short ones can be the worst on long ones.
        num_validation: validation examples of each length.
        imitation: how to fit the start of the search by gradient (:func:`imitate`); None starts at
            zero, where a memory keeps the newest tokens.
    """

    namm: NAMMConfig = field(
        default_factory=lambda: NAMMConfig(
            n_up=64,
            ema_coeff=0.9995,
            feature_transform="log",
            threshold=None,
            cache_size=256,
            budget="per_layer",
            sink_tokens=4,
        )
    )
    generations: int = 100
    popsize: int = 16
    sigma0: float = 0.065
    seed: int = 0
    lengths: tuple[int, ...] = (256, 512, 1024)
    num_examples: int = 8
    mixes: tuple[RecordMix, ...] = (STATED_ONCE,)
    families: tuple[str, ...] = EVOLUTION_FAMILIES
    keep_fraction: float = 0.25
    text_weight: float = 4.0
    validate_every: int = 10
    validation_lengths: tuple[int, ...] = (1024,)
    num_validation: int = 32
    imitation: ImitateConfig | None = None

    def __post_init__(self) -> None:
        for name in (
            *("generations", "popsize", "num_examples"),
            *("validate_every", "num_validation"),
        ):
            least = 2 if name == "popsize" else 1
            if getattr(self, name) < least:
                raise ValueError(
                    f"EvolveConfig: {name} must be at least {least}, got {getattr(self, name)}"
                )
        most = min(self.num_examples, self.num_validation)
        if not 1 <= len(self.mixes) <= most:
            raise ValueError(
                f"EvolveConfig: mixes must have 1 to {most} entries, one example of each in every "
                f"batch, got {len(self.mixes)}"
            )
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(
                f"EvolveConfig: keep_fraction must be in (0, 1], got {self.keep_fraction}"
            )
        if not 0 < self.sigma0 < np.inf:
            raise ValueError(f"EvolveConfig: sigma0 must be positive, got {self.sigma0}")
        both = self.lengths and self.validation_lengths
        shortest = min((*self.lengths, *self.validation_lengths)) if both else 0
        if shortest < 2 * self.namm.n_up:
            raise ValueError(
                f"EvolveConfig: lengths must be at least 2 * n_up = {2 * self.namm.n_up} tokens, "
                f"got {shortest}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "namm": self.namm.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvolveConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: for an unknown key.
            ValueError: for a value out of range.
        """
        values = _tuples(values)
        if "mixes" in values:
            values["mixes"] = tuple(RecordMix(**mix) for mix in values["mixes"])
        if values.get("imitation") is not None:
            values["imitation"] = ImitateConfig(**_tuples(values["imitation"]))
        return cls(**{**values, "namm": NAMMConfig.from_dict(values["namm"])})

    def cache_size(self, length: int) -> int:
        """Tokens a head may keep of a context of ``length`` tokens."""
        return max(1, int(self.keep_fraction * length))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the configurations have tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


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


def with_budget(policy: NAMM, cache_size: int) -> NAMM:
    """The same memory under another budget, in tokens per head."""
    return policy.with_config(cache_size=cache_size)


def calibration_batch(tokenizer: Any, config: EvolveConfig) -> list[Example]:
    """What the statistics of the features are taken from; training documents."""
    seed = (TRAIN_SEED, config.seed, 0)
    length = max(config.validation_lengths)
    return _batch(tokenizer, config, "train", seed, length, config.num_examples)


def training_batch(tokenizer: Any, config: EvolveConfig, generation: int) -> list[Example]:
    """What all candidates of a generation (from 0) are evaluated on; training documents."""
    length = config.lengths[generation % len(config.lengths)]
    seed = (TRAIN_SEED, config.seed, generation + 1)
    return _batch(tokenizer, config, "train", seed, length, config.num_examples)


def validation_batches(tokenizer: Any, config: EvolveConfig) -> dict[int, list[Example]]:
    """What decides which mean is kept, by length: validation documents, the same for every seed."""
    return {
        length: _batch(
            tokenizer, config, "validation", (VALIDATION_SEED,), length, config.num_validation
        )
        for length in config.validation_lengths
    }


def _batch(
    tokenizer: Any,
    config: EvolveConfig,
    split: str,
    seed: tuple[int, ...],
    length: int,
    size: int,
) -> list[Example]:
    return make_mixed_batch(
        config.mixes,
        config.families,
        tokenizer,
        load_documents(split),
        length=length,
        seed=seed,
        batch_size=size,
    )


def calibrate_statistics(
    model: Any, config: NAMMConfig, examples: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the spectral features over a pass in which nothing is evicted.

    Args:
        examples: of one length.

    Returns:
        ``mean [17]`` and ``var [17]``, float32 (spec section 4).
    """
    calibrator = StatisticsCalibrator(config)
    with patch(model, calibrator):
        evaluate_policy(model, calibrator, examples)
    return calibrator.mean, calibrator.var


def evolve(
    model: Any,
    tokenizer: Any,
    config: EvolveConfig,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    x0: Tensor | None = None,
    on_imitation: Callable[[dict[str, Any]], None] | None = None,
    on_generation: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvolveResult:
    """Evolve a memory for ``model`` and keep the one that validates best.

    A run whose ``output_dir`` holds a state is resumed from it; ``KeyboardInterrupt`` at any moment
    loses at most the generation under way.

    Args:
        model: a causal language model of transformers.
        tokenizer: of that model.
        config: see `EvolveConfig`.
        output_dir: where state, log and policy go; None keeps everything in memory.
        x0: ``[num_params]`` initial mean; None takes what ``config.imitation`` says.
        on_imitation: called while the start is fitted, as ``on_step`` of :func:`imitate`.
        on_generation: called with the log record of each generation.
        should_stop: asked before each generation.

    Returns:
        EvolveResult: the best policy, also saved under ``output_dir / "policy"``.

    Raises:
        ValueError: if ``output_dir`` holds a run with another configuration or a damaged state.
    """
    folder = Path(output_dir) if output_dir is not None else None
    run = _Run(model, tokenizer, config, folder, x0, on_imitation)
    with patch(model, run.policy):
        run.validate_start()
        while run.search.generation < config.generations and not should_stop():
            record = run.step()
            if on_generation:
                on_generation(record)
        return run.result()


class _Run:
    """An evolution under way: the search, what was best so far, and their files."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: EvolveConfig,
        folder: Path | None,
        x0: Tensor | None,
        on_imitation: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.model, self.tokenizer, self.config, self.folder = model, tokenizer, config, folder
        n = config.namm.num_params
        if x0 is not None and (tuple(x0.shape) != (n,) or not bool(x0.isfinite().all())):
            raise ValueError(f"evolve: x0 must be [{n}] and finite, got {list(x0.shape)}")
        self.log: list[dict[str, Any]] = []
        self.validation = validation_batches(tokenizer, config)
        if folder is not None and (folder / STATE_FILE).exists():
            self._resume(folder, x0)
        else:
            self.mean, self.var = calibrate_statistics(
                model, config.namm, calibration_batch(tokenizer, config)
            )
            if x0 is None and config.imitation is not None:
                x0 = imitate(
                    *(model, tokenizer, config, config.imitation, self.mean, self.var),
                    on_step=on_imitation,
                )
            self._begin(torch.zeros(n) if x0 is None else x0)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                _write_text(folder / CONFIG_FILE, _json(config.to_dict()))
                _write_text(folder / LOG_FILE, "")
                self._save()
        self.policy = self._policy(torch.from_numpy(self.best_params))

    def _begin(self, x0: Tensor) -> None:
        self.start = x0.detach().cpu().double().numpy()
        self.search = DiagonalCMA(
            self.start, self.config.sigma0, self.config.popsize, self.config.seed
        )
        self.best_params, self.best_value, self.best_generation = self.start, -np.inf, 0

    def _policy(self, params: Tensor, length: int | None = None) -> NAMM:
        """With the budget of a length; of the first validation length by default."""
        length = self.config.validation_lengths[0] if length is None else length
        namm = self.config.namm.replace(cache_size=self.config.cache_size(length))
        return NAMM(namm, params.float(), self.mean, self.var)

    def step(self) -> dict[str, Any]:
        """One generation: ask, evaluate, tell, maybe validate, save."""
        config, generation = self.config, self.search.generation
        began = time.perf_counter()
        examples = training_batch(self.tokenizer, config, generation)
        length = len(examples[0].input_ids)
        candidates = torch.from_numpy(self.search.ask())
        result = evaluate_population(
            self.model, self._policy(candidates, length), examples, config.popsize
        )
        fitness = result.fitness(config.text_weight)
        self.search.tell(fitness.tolist())
        best = int(fitness.argmax())
        record = {
            "generation": self.search.generation,
            "length": length,
            "fitness_best": float(fitness.max()),
            "fitness_mean": float(fitness.mean()),
            "exact_match_best": float(result.exact_match[best].mean()),
            "exact_match_mean": float(result.exact_match.mean()),
            "kept": float(result.kept.mean()),
            "sigma": self.search.sigma,
            "tokens": length * config.num_examples * config.popsize,
        }
        if self.search.generation % config.validate_every == 0:
            record |= self._validate()
        record["seconds"] = round(time.perf_counter() - began, 3)
        self.log.append(record)
        self._save()
        return record

    def validate_start(self) -> None:
        """A start that is not zero may be the best there will be; it is generation 0 of the log."""
        if not self.log and self.start.any():
            self.log.append({"generation": 0, **self._validate()})
            self._save()

    def _validate(self) -> dict[str, float]:
        mean = torch.from_numpy(self.search.mean)
        results = [
            evaluate_policy(self.model, self._policy(mean, length), examples)
            for length, examples in self.validation.items()
        ]

        def average(values: list[Tensor]) -> float:
            return float(torch.cat(values, 1).mean())

        text_ll = average([result.text_ll for result in results])
        answer_ll = average([result.answer_ll for result in results])
        value = answer_ll + self.config.text_weight * text_ll
        if value > self.best_value:
            self.best_params, self.best_value = self.search.mean.copy(), value
            self.best_generation = self.search.generation
            if self.folder is not None:
                self._policy(mean).save_pretrained(self.folder / POLICY_DIR)
        return {
            "validation_fitness": value,
            "validation_exact_match": average([result.exact_match for result in results]),
            "validation_answer_ll": answer_ll,
            "validation_text_ll": text_ll,
        }

    def result(self) -> EvolveResult:
        """The best of the validated means; the current one if none was."""
        if self.best_value == -np.inf and self.search.generation:
            self._validate()
        policy = self._policy(torch.from_numpy(self.best_params))
        if self.folder is not None:
            policy.save_pretrained(self.folder / POLICY_DIR)
        return EvolveResult(policy, self.best_generation, self.log)

    def _save(self) -> None:
        if self.folder is None:
            return
        temporary = self.folder / f".{STATE_FILE}"
        with open(temporary, "wb") as file:
            np.savez(
                file,
                x0=self.start,
                history=np.array(self.search.history),
                search_mean=self.search.mean,
                best_params=self.best_params,
                best_value=np.array(self.best_value),
                best_generation=np.array(self.best_generation),
                feature_mean=self.mean.numpy(),
                feature_var=self.var.numpy(),
                log=np.array(json.dumps(self.log)),
            )
        os.replace(temporary, self.folder / STATE_FILE)
        if self.log:
            with open(self.folder / LOG_FILE, "a", encoding="utf-8") as log:
                log.write(json.dumps(self.log[-1]) + "\n")

    def _resume(self, folder: Path, x0: Tensor | None) -> None:
        stored = _read_config(folder / CONFIG_FILE)
        ours = {**self.config.to_dict(), "generations": 0}
        theirs = {**stored.to_dict(), "generations": 0}
        if ours != theirs:
            changed = sorted(key for key in ours if ours[key] != theirs[key])
            raise ValueError(
                f"evolve: {folder} holds a run with another configuration; these fields differ: "
                f"{', '.join(changed)}"
            )
        path = folder / STATE_FILE
        state = _read_state(path)
        if x0 is None and self.config.imitation is None:
            x0 = torch.zeros(self.config.namm.num_params)
        self._begin(torch.from_numpy(state["x0"]))
        if x0 is not None and not np.array_equal(self.start, x0.detach().cpu().double().numpy()):
            raise ValueError(f"evolve: {folder} holds a run that started from another x0")
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
        # The log file may lack the last generation, if the run was stopped between the two.
        _write_text(folder / LOG_FILE, "".join(json.dumps(r) + "\n" for r in self.log))


_STATE_KEYS = (
    *("x0", "history", "search_mean", "best_params", "best_value", "best_generation"),
    *("feature_mean", "feature_var", "log"),
)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {key: file[key] for key in file.files}
    except Exception as error:  # damaged zip files make numpy raise almost anything
        raise ValueError(f"evolve: {path} must be a state file, got a damaged one") from error
    missing = [key for key in _STATE_KEYS if key not in state]
    if missing:
        raise ValueError(
            f"evolve: {path} must be a state of this program, got one without {missing[0]!r}"
        )
    return state


def _read_config(path: Path) -> EvolveConfig:
    try:
        return EvolveConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"evolve: {path} must be the run's configuration, got {error}") from error


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
