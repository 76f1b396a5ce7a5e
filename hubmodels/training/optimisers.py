"""What moves the weights: AdamW, Google's AdamW of BERT, Muon; which weights decay; the learning rate of a step."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from ..products import multiplies
from .settings import Settings, Spent

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class Kinds(NamedTuple):
    """The parameters that are trained, by what they are: matrices inside the network; embeddings, and whatever else
    decays; biases and norms, which do not."""

    matrices: list[nn.Parameter]
    tables: list[nn.Parameter]
    vectors: list[nn.Parameter]


def kinds(model: nn.Module) -> Kinds:
    """Each trained parameter once, by its module and its shape. Frozen ones are left out."""
    found, seen = Kinds([], [], []), set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            if isinstance(module, NORMS) or parameter.dim() < 2:
                found.vectors.append(parameter)
            elif isinstance(module, nn.Embedding) or parameter.dim() > 2:
                found.tables.append(parameter)
            else:
                found.matrices.append(parameter)
    return found


def make_optimisers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Those of `settings`, over all trained parameters together.

    Muon (Jordan 2024) orthogonalises a matrix's momentum; with steps scaled as Liu et al. 2025 (arXiv 2502.16982, §2.2)
    propose, it takes the learning rate of AdamW, which moves the rest.
    """
    matrices, tables, vectors = kinds(model)
    rate, betas = settings.learning_rate, settings.betas
    made: list[torch.optim.Optimizer] = []
    if settings.optimiser == "muon" and matrices:
        made.append(Muon(matrices, rate, settings.weight_decay, adjust_lr_fn="match_rms_adamw"))
    else:
        tables = matrices + tables
    groups = [{"params": tables, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if groups and settings.optimiser == "google":
        made.append(GoogleAdamW(groups, rate, betas, 1e-6 if settings.eps is None else settings.eps))
    elif groups:
        eps = 1e-8 if settings.eps is None else settings.eps
        fused = all(p.device.type in ("cpu", "cuda") for p in (*tables, *vectors))
        made.append(torch.optim.AdamW(groups, rate, betas, eps, fused=fused))
    return made


def learning_rate(settings: Settings, spent: Spent, warm: Spent) -> float:
    """Of the step that comes after `spent`; `warm`: what was spent when the warm-up ended.

    Linear up over the warm-up, step s (from 0) of w gets peak * (s + 1) / w; then as `schedule` says: linear down to 0
    at the end of the budget, half a cosine down to 0, or the peak.
    """
    peak, step = settings.learning_rate, spent.steps
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return peak
    rest, whole = settings.budget - settings.of(spent), settings.budget - settings.of(warm)
    left = max(0.0, rest / whole) if whole > 0 else 0.0
    return peak * (left if settings.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


class GoogleAdamW(torch.optim.Optimizer):
    """Adam without bias correction, decoupled decay, eps outside of the root: what BERT was trained with.

    Source: google-research/bert, optimization.py, AdamWeightDecayOptimizer.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient. There is no closure."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            grads = [p.grad for p in params]
            means, squares = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            sizes = torch._foreach_sqrt(squares)
            torch._foreach_add_(sizes, group["eps"])
            moves = torch._foreach_div(means, sizes)
            torch._foreach_add_(moves, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, moves, alpha=-group["lr"])


class Muon(torch.optim.Muon):
    """torch's, in float32 where a CPU has no products of bfloat16: torch's takes 35 times as long there.

    For steps that are scaled as `make_optimisers` says.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient. There is no closure."""
        for group in self.param_groups:
            params: list[torch.Tensor] = []
            grads: list[torch.Tensor] = []
            momenta: list[torch.Tensor] = []
            self._init_group(group, params, grads, momenta)
            rate, momentum = group["lr"], group["momentum"]
            for p, grad, mean in zip(params, grads, momenta, strict=True):
                mean.lerp_(grad, 1 - momentum)
                move = orthogonalised(grad.lerp(mean, momentum), group["ns_coefficients"], group["ns_steps"])
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(move, alpha=-rate * 0.2 * math.sqrt(max(p.shape)))


def orthogonalised(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """[N, M] with its singular values brought to about 1, from 0.7 to 1.2, by the Newton-Schulz iteration of Muon."""
    a, b, c = coefficients
    x = matrix.to(torch.bfloat16 if not matrix.is_cpu or multiplies(torch.bfloat16) else torch.float32)
    is_high = len(x) > x.shape[1]
    x = x.T if is_high else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_high else x
