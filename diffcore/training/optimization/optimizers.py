"""Optimizers: their construction, groups of parameters, learning rate, and two sets of weights.

A schedule-free optimizer (Defazio et al. 2024, 2405.15682) computes gradients at weights y and
evaluates the network at their average x; its methods `train` and `eval` exchange them.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffcore.core.network import ExportableNetwork, unwrap
from diffcore.run import OptimizerFactory
from diffcore.training.optimization.lr import LearningRate

__all__ = [
    "AveragingOptimizer",
    "build_optimizer",
    "evaluation_weights",
    "group_parameters",
    "set_learning_rate",
]

FACTOR = "lr_factor"
"""Key of a parameter group: the factor of its learning rate."""


@runtime_checkable
class AveragingOptimizer(Protocol):
    """An optimizer whose weights for evaluation differ from those at which gradients are taken."""

    param_groups: list[dict[str, Any]]
    state: Any

    def train(self) -> None:
        """Give the parameters the values at which gradients are computed."""

    def eval(self) -> None:
        """Give the parameters the values with which the network is evaluated."""


def build_optimizer(
    factory: OptimizerFactory,
    modules: Sequence[nn.Module],
    lr: LearningRate,
    decay_only_matrices: bool,
) -> Optimizer:
    """Build the optimizer of the parameters that require a gradient.

    Args:
        factory: builds the optimizer from parameters or groups of them, and the learning rate.
        modules: modules that are trained, as they are wrapped or sharded.
        lr: learning rate of the run.
        decay_only_matrices: true excludes norms, biases and embeddings from the weight decay.

    Returns:
        The optimizer, at the weights at which gradients are computed.

    Raises:
        ValueError: The optimizer refuses its options, needs a closure, has no weight decay that
            could be limited to matrices, or replaces the decay of the learning rate.
    """
    trained = nn.ModuleList(modules)
    parameters: Any = [value for value in trained.parameters() if value.requires_grad]
    if decay_only_matrices:
        parameters = group_parameters(trained)
    if factors := _learning_rate_factors(modules):
        groups = parameters if decay_only_matrices else [{"params": parameters}]
        parameters = [part for group in groups for part in _split(group, factors, lr.peak)]
    try:
        optimizer = factory(parameters, lr.peak)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the optimizer cannot be built with its options and lr.peak {lr.peak}: {error}"
        ) from error
    _check(optimizer, lr, decay_only_matrices)
    if isinstance(optimizer, AveragingOptimizer):
        optimizer.train()
        optimizer.state.clear()  # empty entries, which a checkpoint would take for a state
    return optimizer


def group_parameters(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of parameters: with the optimizer's weight decay, and without weight decay.

    Weight decay applies to each parameter of at least two dimensions that is called a weight, such
    as `weight` or `in_proj_weight`, of a module that is neither an embedding (`nn.Embedding`,
    `nn.EmbeddingBag`) nor a norm (a class with "Norm" in its name). It does not apply to biases,
    gains of norms, tables of labels, and tables of positions such as `pos_embed`.

    Args:
        module: module whose parameters are grouped; frozen ones are left out.

    Returns:
        The groups for the optimizer; a group without parameters is left out.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    seen: set[int] = set()  # a shared parameter belongs where it occurs first
    for owner in module.modules():
        for name, value in owner.named_parameters(recurse=False):
            if value.requires_grad and id(value) not in seen:
                (decayed if _is_decayed(owner, name, value) else others).append(value)
            seen.add(id(value))
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_decayed(owner: nn.Module, name: str, value: nn.Parameter) -> bool:
    is_table = isinstance(owner, nn.Embedding | nn.EmbeddingBag)
    is_norm = "Norm" in type(owner).__name__
    return "weight" in name and value.ndim >= 2 and not is_table and not is_norm


def _learning_rate_factors(modules: Sequence[nn.Module]) -> dict[nn.Parameter, float]:
    """Trained parameter -> factor of its learning rate, where a network has one."""
    factors = {}
    for module in map(unwrap, modules):
        if isinstance(module, ExportableNetwork):
            parameters = dict(module.named_parameters())
            for name, factor in module.learning_rate_factors.items():
                factors[parameters[name]] = factor
    return factors


def _split(
    group: dict[str, Any], factors: Mapping[nn.Parameter, float], peak: float
) -> Iterator[dict[str, Any]]:
    """A group by the factor of the learning rate, which each part has as its `FACTOR`."""
    by_factor: dict[float, list[nn.Parameter]] = {}
    for value in group["params"]:
        by_factor.setdefault(factors.get(value, 1.0), []).append(value)
    for factor, values in by_factor.items():
        yield group | {"params": values, "lr": factor * peak, FACTOR: factor}


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of every group, in place where an optimizer keeps it in a tensor.

    Args:
        optimizer: optimizer.
        value: learning rate of the next step, which a group multiplies by its factor if it has one.
    """
    for group in optimizer.param_groups:
        rate = value * group.get(FACTOR, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """Context in which the parameters have the values with which the network is evaluated.

    On exit, also after an error, they have their values of before, bit for bit. Only an
    `AveragingOptimizer` has two sets of values.

    Args:
        optimizer: optimizer of the parameters, without accelerate's wrapper.

    Yields:
        Nothing; the parameters are changed in place.
    """
    if not isinstance(optimizer, AveragingOptimizer):
        yield
        return
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    before = [value.detach().clone() for value in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # is equal to `before` to rounding only
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)


def _check(optimizer: Optimizer, lr: LearningRate, decay_only_matrices: bool) -> None:
    name = type(optimizer).__name__
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer is {name}, whose step evaluates the loss several times (a closure): choose "
            "one that does not, such as torch.optim.AdamW"
        )
    if decay_only_matrices and "weight_decay" not in optimizer.defaults:
        raise ValueError(
            f"decay_only_matrices is true, but the optimizer {name} has no weight decay: set "
            "decay_only_matrices: false"
        )
    if isinstance(optimizer, AveragingOptimizer) and lr.shape != "constant":
        raise ValueError(
            f"lr.shape is {lr.shape}, but {name} averages the weights in place of a decay of the "
            "learning rate: set lr.shape: constant"
        )
