"""Check before training that configuration, model and data fit together.

Example::

    metrics = load_metrics(config, mixture)
    check_compatibility(config, loaded, mixture, metrics.metrics)    # ConfigError says what to do
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.config.schema import Config
from trainer.data.examples import Mixture
from trainer.errors import ConfigError
from trainer.model.answers import AnswerRule
from trainer.model.load import LoadedModel, max_positions
from trainer.model.metrics import Metric
from trainer.model.training_state import is_weight
from trainer.model.weights import in_adapter, memory_key, weights_of


def check_compatibility(
    config: Config, loaded: LoadedModel, mixture: Mixture, metrics: Mapping[str, Metric]
) -> None:
    """Raise :class:`ConfigError` if configuration, model and data do not fit together."""
    evaluated = {
        name: [
            example for split in (sub.validation, sub.test) if split for example in split.examples
        ]
        for name, sub in mixture.items()
    }
    exact = [name for name in mixture if metrics[name].name == "exact_match"]
    for name in exact:
        if any(not example.graded for example in evaluated[name]):
            raise ConfigError(
                f"the metric of sub-dataset {name!r} is exact_match, but rows of 'text' have no "
                f"answer to match: set evaluation.metric, or data.sub_datasets.{name}.metric, to "
                "loss, or give prompt and completion"
            )
    if exact:
        references = {name: mixture[name].validation.examples for name in exact}
        AnswerRule.of(config.evaluation).check(references)
    kept = _find_copies(loaded.model)
    if kept:
        raise ConfigError(
            f"the model's {kept[0]!r} is not the memory of a plain parameter or buffer, so that a "
            "roll-back could not restore it in place: use a model that is neither quantised nor "
            "keeps extra state, or lora on top of it"
        )
    lost = _find_unkept(loaded.model)
    if lost:
        raise ConfigError(
            f"the model's {lost[0]!r} is trained, but no checkpoint would hold it, because the "
            "model's state_dict() leaves it out: freeze it, or keep it in the state"
        )
    reserved = next((name for name in loaded.model.state_dict() if not is_weight(name)), None)
    if config.restores_optimizer and reserved is not None:
        raise ConfigError(
            f"the model has a weight {reserved!r}, but msft.optimizer_on_rollback=restore reserves "
            "such names for the optimizer: set it to reset"
        )
    positions = max_positions(loaded.model)
    if positions is None:
        return
    if config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but the model has {positions} "
            f"positions: set data.max_length={positions} or less"
        )
    prompts = [
        len(example.prompt)
        for name, examples in evaluated.items()
        for example in (examples if metrics[name].generates else ())
    ]
    prompt = max(prompts, default=0)
    if prompts and prompt + config.evaluation.max_new_tokens > positions:
        raise ConfigError(
            f"evaluation.max_new_tokens is {config.evaluation.max_new_tokens} and the longest "
            f"prompt has {prompt} tokens, but the model has {positions} positions: lower "
            "max_new_tokens or data.max_length"
        )


def _find_copies(model: torch.nn.Module) -> list[str]:
    """Return the weights that are tensor subclasses, extra state or made by ``state_dict()``."""
    parameters = model.named_parameters(remove_duplicate=False)
    own = dict([*parameters, *model.named_buffers(remove_duplicate=False)])
    state = model.state_dict()
    adapter = {name: value for name, value in state.items() if in_adapter(name)}
    return [
        name
        for name, value in (adapter or state).items()
        if type(value) is not torch.Tensor
        or name not in own
        or value.data_ptr() != own[name].data_ptr()
    ]


def _find_unkept(model: torch.nn.Module) -> list[str]:
    """Return the parameters that are trained and not among the run's weights."""
    kept = {memory_key(tensor) for tensor in weights_of(model).values()}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and memory_key(parameter) not in kept
    ]
