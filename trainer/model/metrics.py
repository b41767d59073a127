"""The metric of each sub-dataset: a built-in one, or a function of the user.

A function takes the greedy generations, or the model. Its parameters decide which, by their names:

- ``(generations, references, rows)``: lists of equal length, one item an example of one
  sub-dataset. A generation is the whole generated text, a reference the text of the completion,
  and a row what the file has, so that a metric can use its other columns.
- ``(model, tokenizer, rows)``: the model in evaluation mode, without gradients.

It returns a number, or one number an example. The metric is then their mean and has a standard
error, which ``msft.peaks: robust`` needs. The function has an attribute ``mode``: ``max`` or
``min``, the direction in which the metric improves.

Invariant: a function leaves the random number generators of Python, NumPy and torch as they were,
so that training does not depend on it.

Example::

    # lengths.py beside the configuration; evaluation: {metric: "lengths:brevity"}
    def brevity(generations, references, rows):
        return [len(text) for text in generations]

    brevity.mode = "min"
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.algorithms.base import Mode
from trainer.algorithms.overall import MixtureMetrics, mixture_metrics
from trainer.config.metric_keys import BUILT_IN
from trainer.config.schema import Config, EvalConfig
from trainer.data.examples import Mixture
from trainer.errors import ConfigError, RunError, first_line
from trainer.text import metric_title

_FORMS = (("generations", "references", "rows"), ("model", "tokenizer", "rows"))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric that can be computed."""

    name: str
    mode: Mode
    function: Callable[..., Any] | None = None
    """``None``: a built-in metric."""
    takes_model: bool = False

    @property
    def generates(self) -> bool:
        """True if the metric needs greedy generations."""
        return self.name == "exact_match" or (self.function is not None and not self.takes_model)

    def call(self, count: int, **arguments: Any) -> tuple[float, tuple[float, ...] | None]:
        """Return the value of the function on ``count`` examples, and the value of each example.

        Raises :class:`RunError` if the function raises an error or returns anything else.
        """
        if self.function is None:
            raise ValueError(f"{self.name} is no function")
        with _kept_generators():
            try:
                found = self.function(**arguments)
            except Exception as error:  # whatever the user's function raises
                raise RunError(
                    f"the metric {self.name} raised {type(error).__name__}: {first_line(error)} "
                    f"({_place(error)}); correct it, then continue with `msft-train resume RUN`"
                ) from error
        values = _plain(found)
        if isinstance(values, Real):
            return float(values), None
        if not isinstance(values, list | tuple):
            raise self._wrong(f"a {type(found).__name__}", count)
        values = [_plain(value) for value in values]
        if len(values) != count or not all(isinstance(value, Real) for value in values):
            raise self._wrong(f"a list of {len(values)} items that begins {values[:3]!r}", count)
        scores = tuple(float(value) for value in values)
        return math.fsum(scores) / count, scores

    def _wrong(self, found: str, count: int) -> RunError:
        return RunError(
            f"the metric {self.name} must return a number, or a list of {count} numbers, one an "
            f"example; it returned {found}: correct it, then continue with `msft-train resume RUN`"
        )


def load_metric(name: str) -> Metric:
    """Return a metric by the name that the loaded configuration has.

    Raises :class:`ConfigError` if a function cannot be imported, has other parameters or no mode.
    """
    if name in BUILT_IN:
        return Metric(name=name, mode=BUILT_IN[name])
    module, _, attribute = name.rpartition(":")
    try:
        function = getattr(_import(module), attribute)
    except Exception as error:  # a module is a program, which may raise any error
        raise ConfigError(
            f"the metric {name} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    form = next((form for form in _FORMS if _takes(function, form)), None)
    if form is None:
        forms = " or ".join(f"({', '.join(form)})" for form in _FORMS)
        raise ConfigError(f"the metric {name} must be a function with the parameters {forms}")
    mode = getattr(function, "mode", None)
    if mode not in ("max", "min"):
        raise ConfigError(
            f'the metric {name} has no direction: write `{attribute}.mode = "max"`, or '
            '"min", below the function'
        )
    return Metric(name=name, mode=mode, function=function, takes_model="model" in form)


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """The metrics that decide in a run."""

    metrics: Mapping[str, Metric]
    """Sub-dataset → metric."""
    mixture: MixtureMetrics
    """Their names and directions, and the rule for the metric of the mixture."""

    @classmethod
    def load(cls, config: EvalConfig, names: Mapping[str, str]) -> RunMetrics:
        """Return the metrics of sub-datasets by their names.

        Raises :class:`ConfigError` if one cannot be loaded, or ``overall`` fits none of them.
        """
        loaded = {name: load_metric(name) for name in dict.fromkeys(names.values())}
        metrics = {sub_dataset: loaded[name] for sub_dataset, name in names.items()}
        try:
            mixture = mixture_metrics(
                names,
                {sub_dataset: metric.mode for sub_dataset, metric in metrics.items()},
                overall=config.overall,
                unit=config.metric,
            )
        except ConfigError:
            raise ConfigError(
                f"evaluation.overall: {config.overall} is the mean of the sub-datasets that are "
                f"measured by evaluation.metric, {metric_title(config.metric)}, and there is none: "
                "set evaluation.metric to the metric of some of them, or overall to relative"
            ) from None
        return cls(metrics=metrics, mixture=mixture)


def load_metrics(config: Config, mixture: Mixture) -> RunMetrics:
    """Return the metrics of a run; raise :class:`ConfigError` if they do not fit.

    A sub-dataset of plain text, which has no references, is measured by its loss where exact match
    is the metric of others.
    """
    default, given = config.evaluation.metric, config.data.sub_datasets
    names = {sub_dataset: given[sub_dataset].metric or default for sub_dataset in mixture}
    texts = [
        sub_dataset
        for sub_dataset, splits in mixture.items()
        if given[sub_dataset].metric is None
        and default == "exact_match"
        and not any(example.graded for example in splits.validation.examples)
    ]
    if len(texts) < len(names):
        names |= dict.fromkeys(texts, "loss")
    return RunMetrics.load(config.evaluation, names)


def _import(module: str) -> Any:
    """Import a module by its name, or by the path of its file."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    file = Path(module)
    if (folder := str(file.parent)) not in sys.path:
        sys.path.append(folder)  # for modules beside it
    # Under its own name it could stand for another module.
    spec = importlib.util.spec_from_file_location(f"msft_metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module at {file}")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # as dataclasses need it
    spec.loader.exec_module(loaded)
    return loaded


def _takes(function: Any, names: Sequence[str]) -> bool:
    """Return True if a function can be called with keyword arguments of these names."""
    try:
        inspect.signature(function).bind(**dict.fromkeys(names))
    except (TypeError, ValueError):
        return False
    return True


def _plain(value: Any) -> Any:
    """Return numbers of NumPy and torch, also in arrays, as those of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def _place(error: BaseException) -> str:
    """Return the line of the function that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = frames[min(1, len(frames) - 1)]  # the first one is the call
    return f"{frame.filename}, line {frame.lineno}"


@contextmanager
def _kept_generators() -> Iterator[None]:
    """Restore the random number generators at the end."""
    own, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(arrays)
