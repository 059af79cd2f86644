"""Optimizers, and the optimizer, learning-rate schedule and gradient clipping of a run."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from diffusion_cli.config.catalogue import PACKAGE
from diffusion_cli.config.libraries import is_named
from diffusion_cli.config.validate import target
from diffusion_cli.config.values import Node
from diffusion_cli.errors import NO_VALUE, UsageError, first_line
from diffusion_cli.training.lr_schedules import LRSchedule

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration of Muon (Jordan et al. 2024)."""
SMALLEST_NORM = 1e-7
RMS_OF_ADAM = 0.2
"""Root mean square of the updates of AdamW (Liu et al. 2025, Sec. 2.2)."""


class Adam(optim.Adam):
    """Adam (Kingma and Ba 2015)."""

    def __init__(
        self,
        params: Parameters,
        fused: bool = False,
        *,
        lr: PositiveFloat,
        betas: Sequence[float] = (0.9, 0.999),
        eps: PositiveFloat = 1e-08,
    ) -> None:
        super().__init__(params, lr=lr, betas=_decay_rates(betas), eps=eps, fused=fused)


class AdamW(optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    def __init__(
        self,
        params: Parameters,
        fused: bool = False,
        *,
        lr: PositiveFloat,
        betas: Sequence[float] = (0.9, 0.99),
        eps: PositiveFloat = 1e-08,
        weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=_decay_rates(betas), eps=eps, weight_decay=weight_decay, fused=fused
        )


class Lion(optim.Optimizer):
    """Lion, the sign of an interpolated momentum (Chen et al. 2023, Algorithm 2).

    `w <- w - lr (sign(beta_1 m + (1 - beta_1) g) + weight_decay w)`, then `m <- beta_2 m + (1 - beta_2) g`.
    """

    def __init__(
        self,
        params: Parameters,
        *,
        lr: PositiveFloat,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": _decay_rates(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights; `closure` computes the gradients and returns the loss."""
        loss = _loss(closure)
        for group, weight, gradient, state in _updated(self):
            if not state:
                state["exp_avg"] = torch.zeros_like(weight)
            momentum, (beta_1, beta_2) = state["exp_avg"], group["betas"]
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(momentum.lerp(gradient, 1 - beta_1).sign_(), alpha=group["lr"])
            momentum.lerp_(gradient, 1 - beta_2)
        return loss


class Muon(optim.Optimizer):
    """Muon for the weight matrices of hidden layers, AdamW for all other weights (Jordan et al. 2024).

    A matrix [A, B] moves along its orthogonalized momentum, times `0.2 sqrt(max(A, B))`, which is as long as a step of
    AdamW, so that both have one learning rate (Liu et al. 2025, Eq. 4). A convolution is the matrix [out, in * kernel].
    The first layer, the last layer, embeddings, biases and norms are left to AdamW.
    """

    shards = False

    def __init__(
        self,
        params: Parameters,
        *,
        lr: PositiveFloat,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
        nesterov: bool = True,
        ns_steps: PositiveInt = 5,
        betas: Sequence[float] = (0.9, 0.99),
        eps: PositiveFloat = 1e-08,
        weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        options |= {"betas": _decay_rates(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "matrices": False})

    @staticmethod
    def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
        """Return the group of the weight matrices of hidden layers, and that of all other weights."""
        weights_of = {
            name: part._parameters.get("weight")
            for name, part in module.named_modules()
            if not isinstance(part, nn.Embedding)
        }
        layers = {
            name: weight for name, weight in weights_of.items() if weight is not None and weight.ndim > 1
        }
        outer = [
            f"{name}.{layer}".lstrip(".")
            for name, part in module.named_modules()
            for layer in getattr(part, "outer_layers", ())
        ] or [*layers][:1] + [*layers][-1:]
        hidden = {
            id(weight)
            for name, weight in layers.items()
            if not any(name == layer or name.startswith(f"{layer}.") for layer in outer)
        }
        weights = [*module.parameters()]
        return [
            {
                "params": [weight for weight in weights if (id(weight) in hidden) == matrices],
                "matrices": matrices,
            }
            for matrices in (True, False)
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights; `closure` computes the gradients and returns the loss."""
        loss = _loss(closure)
        for group, weight, gradient, state in _updated(self):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            if group["matrices"]:
                self._orthogonal_step(group, weight, gradient, state)
            else:
                self._adam_step(group, weight, gradient, state)
        return loss

    @staticmethod
    def _orthogonal_step(
        group: Mapping[str, Any], weight: Tensor, gradient: Tensor, state: dict[str, Any]
    ) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        matrix = update.flatten(1)
        length = RMS_OF_ADAM * math.sqrt(max(matrix.shape))
        weight.sub_(orthogonalized(matrix, group["ns_steps"]).view_as(weight), alpha=group["lr"] * length)

    @staticmethod
    def _adam_step(group: Mapping[str, Any], weight: Tensor, gradient: Tensor, state: dict[str, Any]) -> None:
        if not state:
            state |= {"step": torch.zeros((), device="cpu")}
            state |= {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        state["step"] += 1
        (beta_1, beta_2), number = group["betas"], state["step"].item()
        mean = state["exp_avg"].lerp_(gradient, 1 - beta_1)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta_2)
        scale = (square / (1 - beta_2**number)).sqrt_().add_(group["eps"])
        weight.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta_1**number))


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """Return U V^T for a matrix U S V^T, with singular values of about 0.7 to 1.2 in place of 1.

    Each step is `X <- a X + b (X X^T) X + c (X X^T)^2 X` (Jordan et al. 2024). A GPU computes in bfloat16.

    Args:
        matrix: [A, B].
        steps: number of iterations.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else matrix.dtype)
    x = x.T if len(matrix) > matrix.shape[1] else x
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


def _decay_rates(betas: Sequence[float]) -> tuple[float, float]:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UsageError("optimizer.betas", betas, "must be two numbers in [0, 1)", "use [0.9,0.999]")
    return betas[0], betas[1]


def _loss(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _updated(
    optimizer: optim.Optimizer,
) -> Iterator[tuple[Mapping[str, Any], Tensor, Tensor, dict[str, Any]]]:
    """Yield the group, gradient and state of each weight that has a gradient."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                yield group, weight, weight.grad, optimizer.state[weight]


@dataclass(frozen=True)
class Optimization:
    """The optimizer, the learning-rate schedule and the gradient clipping of a run, as nodes of its configuration."""

    optimizer: Node
    lr_schedule: Node
    clip_norm: float | None

    @property
    def has_own_schedule(self) -> bool:
        """Whether the schedule is an `LRSchedule`, which changes the learning rate only."""
        return issubclass(target(self.lr_schedule), LRSchedule)

    @property
    def is_plain(self) -> bool:
        """Whether training changes no option of the optimizer except the learning rate, which stays below `lr`."""
        known = is_named(self.optimizer["_target_"]) or self.optimizer["_target_"].startswith(f"{PACKAGE}.")
        return known and self.has_own_schedule

    def make(self, module: nn.Module, fused: bool) -> tuple[optim.Optimizer, LRScheduler]:
        """Return the optimizer of the weights of a module and its scheduler.

        Args:
            module: has the weights.
            fused: run the step in one kernel, if the optimizer has one.
        """
        optimizer = self._optimizer(self._groups(module), fused)
        return optimizer, self._scheduler(optimizer)

    def check(self, module: nn.Module, *, sharded: bool, max_steps: int | None) -> None:
        """Raise UsageError if the optimizer or the schedule cannot train a module.

        Args:
            module: the network in training.
            sharded: whether each process has a part of every weight.
            max_steps: number of steps of the training, or None without a limit.
        """
        kind = target(self.optimizer)
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            problem = "computes the loss several times per step (a closure), but training computes it once"
            remedy = "use another optimizer=, such as adamw"
            raise UsageError("optimizer._target_", self.optimizer["_target_"], problem, remedy)
        if sharded and not getattr(kind, "shards", True):
            problem = f"{kind.__name__} needs whole weight matrices, and fsdp shards them"
            remedy = "use trainer.strategy=ddp, or another optimizer"
            raise UsageError("trainer.strategy", "fsdp", problem, remedy)
        _, scheduler = self.trial(module, alike=False)
        steps = scheduler.total_steps if isinstance(scheduler, OneCycleLR) else None
        if steps is not None and max_steps is not None and steps < max_steps:
            problem = f"{type(scheduler).__name__} ends at step {steps}, before max_steps={max_steps}"
            raise UsageError("lr_schedule", NO_VALUE, problem, f"use lr_schedule.total_steps={max_steps}")

    def trial(self, module: nn.Module, *, alike: bool = True) -> tuple[optim.Optimizer, LRScheduler]:
        """Return an optimizer and a scheduler after one step on copies of the weights without values.

        Args:
            module: has the weights.
            alike: copy all weights; if false, one weight of each shape in each group.

        Raises UsageError if a class of a library cannot train the module.
        """
        copies = _copies if alike else _copies_of_each_shape
        try:
            return self._stepped(module, partial(copies, device="meta"))
        except Exception:  # some optimizers read numbers, which meta tensors do not have
            return self._stepped(module, partial(copies, device="cpu"))

    def _stepped(
        self, module: nn.Module, copies: Callable[[list[nn.Parameter]], list[nn.Parameter]]
    ) -> tuple[optim.Optimizer, LRScheduler]:
        def new_optimizer(node: Node) -> optim.Optimizer:
            groups = [{**group, "params": copies(group["params"])} for group in self._groups(module)]
            return replace(self, optimizer=node)._optimizer(groups, fused=False)

        with _naming("optimizer", self.optimizer, new_optimizer):
            optimizer = new_optimizer(self.optimizer)

        def new_scheduler(node: Node) -> LRScheduler:
            return replace(self, lr_schedule=node)._scheduler(optimizer)

        with _naming("lr_schedule", self.lr_schedule, new_scheduler):
            scheduler = new_scheduler(self.lr_schedule)
        with _naming("optimizer", self.optimizer):
            optimizer.step()
        with _naming("lr_schedule", self.lr_schedule):
            scheduler.step()
        return optimizer, scheduler

    def _groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Return the groups of weights that are trained."""
        grouped = getattr(target(self.optimizer), "parameter_groups", None)
        groups = [{"params": module.parameters()}] if grouped is None else grouped(module)
        trained = [
            {**group, "params": [weight for weight in group["params"] if weight.requires_grad]}
            for group in groups
        ]
        return [group for group in trained if group["params"]]

    def _optimizer(self, groups: list[dict[str, Any]], fused: bool) -> optim.Optimizer:
        kind, options = target(self.optimizer), _options(self.optimizer)
        chosen = options.get("fused") is not None or options.get("foreach") or options.get("differentiable")
        if fused and not chosen and "fused" in inspect.signature(kind).parameters:
            options["fused"] = True
        return kind(groups, **options)

    def _scheduler(self, optimizer: optim.Optimizer) -> LRScheduler:
        made = target(self.lr_schedule)
        if self.has_own_schedule:
            return LambdaLR(optimizer, made(**_options(self.lr_schedule)).factor)
        return made(optimizer, **_options(self.lr_schedule))


def _options(node: Node) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "_target_"}


def _copies(weights: Iterable[nn.Parameter], device: str) -> list[nn.Parameter]:
    """Return parameters of the same shapes and types, with gradients of zeros."""
    copies = [nn.Parameter(torch.zeros_like(weight, device=device)) for weight in weights]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    return copies


def _copies_of_each_shape(weights: Iterable[nn.Parameter], device: str) -> list[nn.Parameter]:
    """Return such a parameter for each shape and type among the weights."""
    return _copies({(weight.shape, weight.dtype): weight for weight in weights}.values(), device)


LIBRARY_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError)


@contextmanager
def _naming(key: str, node: Node, make: Callable[[Node], object] | None = None) -> Iterator[None]:
    """Turn an error of a class of a library into a UsageError about its wrong value, or about the class.

    Args:
        key: key of the node.
        node: class and arguments.
        make: builds a node, to find the argument for which the default avoids the error; None: the class is named.
    """
    try:
        yield
    except LIBRARY_ERRORS as error:
        if isinstance(error, UsageError) or not is_named(node["_target_"]):
            raise
        if wrong := make and _wrong_argument(node, make):
            problem, remedy = f"{node['_target_']} refuses it ({first_line(error)})", "use another value"
            raise UsageError(f"{key}.{wrong}", node[wrong], problem, remedy) from error
        problem = f"does not work here ({first_line(error)})"
        remedy = f"correct its values, or use another {key}="
        raise UsageError(f"{key}._target_", node["_target_"], problem, remedy) from error


def _wrong_argument(node: Node, make: Callable[[Node], object]) -> str | None:
    """Return the first argument without which a node can be built; None if there is none."""
    for name in _options(node):
        with suppress(*LIBRARY_ERRORS):
            make({key: value for key, value in node.items() if key != name})
            return name
    return None
