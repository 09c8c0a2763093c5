"""Cases for the kernels' tests, and how far a result may lie from the specification in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from repcon_kernels import HeadSpec, functional, multi_head_kl
from repcon_kernels.kl_div import reference
from torch import Tensor

TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True)
class Case:
    """Arguments of `multi_head_kl`, and an upstream gradient (H,)."""

    logits: Tensor
    heads: tuple[HeadSpec, ...]
    ids: tuple[Tensor, ...]
    logp: tuple[Tensor, ...]
    weights: Tensor
    upstream: Tensor
    rows: Tensor | None = None

    def to(self, device: str) -> "Case":
        return replace(
            self,
            logits=self.logits.to(device),
            ids=tuple(part.to(device) for part in self.ids),
            logp=tuple(part.to(device) for part in self.logp),
            weights=self.weights.to(device),
            upstream=self.upstream.to(device),
            rows=None if self.rows is None else self.rows.to(device),
        )


def stored(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What the store keeps of a teacher's logits (R, C): ids (R, k) uint16, values (R, k + 2) float16."""
    log_p = logits.double().log_softmax(dim=1)
    top, ids = log_p.topk(k, dim=1)
    others = log_p.scatter(1, ids, -torch.inf)
    tails = [(others / temperature).logsumexp(dim=1) for temperature in TEMPERATURES]
    return ids.to(torch.uint16), torch.cat([top, torch.stack(tails, dim=1)], dim=1).half()


def make(
    batch: int,
    shapes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
    gap: int = 0,
    gathered: bool = False,
    seed: int = 0,
) -> Case:
    """`shapes` are (classes, k) of each head; temperatures alternate; `gap` columns stay free after each head."""
    torch.manual_seed(seed)
    heads, ids, logp, column = [], [], [], 0
    label_rows = 2 * batch + 3 if gathered else batch
    for number, (classes, k) in enumerate(shapes):
        column_of_tail = number % 2
        temperature = TEMPERATURES[column_of_tail]
        heads.append(HeadSpec(start=column, classes=classes, k=k, temperature=temperature, tail_column=column_of_tail))
        head_ids, head_logp = stored(3 * torch.randn(label_rows, classes), k)
        ids.append(head_ids)
        logp.append(head_logp)
        column += classes + gap
    return Case(
        logits=(spread * torch.randn(batch, column)).to(dtype),
        heads=tuple(heads),
        ids=tuple(ids),
        logp=tuple(logp),
        weights=torch.linspace(0.5, 2, len(shapes)),
        upstream=torch.linspace(1, 3, len(shapes)),
        rows=torch.randint(label_rows, (batch,)) if gathered else None,
    )


def specification(case: Case, tail: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Losses (H,) and the gradient of their upstream-weighted sum by the logits, in `dtype` on the CPU."""
    case = case.to("cpu")
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    losses = reference.multi_head_kl(
        logits, case.heads, case.ids, case.logp, rows=case.rows, weights=case.weights, tail=tail
    )
    (losses * case.upstream).sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


def compute(case: Case, tail: str, implementation: str, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """The same from `multi_head_kl`, on the CPU; in_place: the gradient lies over the logits, as in `linear_kl`."""
    if in_place:
        logits = case.logits.clone()
        labels = functional.operator_labels(
            case.heads, case.ids, case.logp, case.rows, case.weights, tail, implementation
        )
        losses = functional.run_implementation(logits, logits, len(logits), *labels)
        scale = 1 / functional.stored_scale(logits.dtype, len(logits))
        starts = [head.start for head in case.heads]
        torch.ops.repcon_kernels.scale_heads_(logits, case.upstream, scale, starts, implementation)
        return losses.cpu(), logits.cpu()
    leaf = case.logits.clone().requires_grad_()
    losses = backward(case, leaf, tail, implementation)
    assert leaf.grad is not None
    return losses.detach().cpu(), leaf.grad.cpu()


def backward(case: Case, leaf: Tensor, tail: str, implementation: str) -> Tensor:
    """Losses (H,) of `multi_head_kl` for logits computed from the leaf, which gets their upstream-weighted gradient."""
    losses = multi_head_kl(
        leaf * 1,
        case.heads,
        case.ids,
        case.logp,
        rows=case.rows,
        weights=case.weights,
        tail=tail,
        implementation=implementation,
    )
    (losses * case.upstream).sum().backward()
    return losses


def assert_meets(case: Case, tail: str, losses: Tensor, gradient: Tensor) -> None:
    """No further from the float64 specification than twice the float32 specification is, and a band for rounding: 2^-20
    of what a loss or gradient of order one is here, and two units in the gradient's last place, which is rounded when
    it is stored and again when the upstream gradient comes (Triton's interpreter cuts off where a GPU rounds)."""
    exact_losses, exact_gradient = specification(case, tail)
    coarse_losses, coarse_gradient = specification(case, tail, torch.float32)
    assert gradient.dtype == case.logits.dtype
    band = 2 * torch.finfo(gradient.dtype).eps * exact_gradient.abs()
    if gradient.dtype == torch.float16:
        band = band + torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    for number, head in enumerate(case.heads):
        weight = float(case.weights[number]) * head.temperature
        room = 2 * (coarse_losses - exact_losses)[number].abs()
        room = room + 2**-20 * (exact_losses[number].abs() + weight * head.temperature)
        error = (losses[number] - exact_losses[number]).abs()
        assert error <= room, f"head {number}: loss off by {error:.3g}, of at most {room:.3g}"
        columns = slice(head.start, head.stop)
        room = 2 * (coarse_gradient - exact_gradient)[:, columns].abs().max() + band[:, columns]
        room = room + 2**-20 * weight * float(case.upstream[number]) / len(gradient)
        excess = ((gradient - exact_gradient)[:, columns].abs() - room).max()
        assert excess <= 0, f"head {number}: gradient off by {excess:.3g} more than allowed"
    free = torch.ones(gradient.shape[1], dtype=torch.bool)
    for head in case.heads:
        free[head.start : head.stop] = False
    assert (gradient[:, free] == 0).all(), "the free columns have a gradient"
