"""Consolidation students trained in memory, from what the frozen part of the network gives for every crop.

Only for EfficientNets whose first blocks are frozen in generalist, teachers and students alike. The loss is the KL to
whole distributions (the stores keep the 16 most probable classes and the exact tail; no difference was measured).
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.experiments.consolidation.protocol import DOWNSTREAM_HALF, GENERALIST
from benchmarks.experiments.consolidation.study import Study
from repcon.config import ClassSubset, CropConfig
from repcon.crops.plan import plan_crops
from repcon.decode.base import CropRequest
from repcon.decode.factory import open_loader
from repcon.evaluation import probes
from repcon.evaluation.features import centred_squares
from repcon.images.pack import ImagePack, select_classes
from repcon.models.factory import create_model
from repcon.models.preprocessing import Preprocessing, normalise, preprocessing_of

# isort: split
from timm.optim import param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage]

STAGES = 5
"""timm's stages of the network that are frozen: blocks 0 to 10."""
CROPS = 20
HELD_OUT = 50
"""One image in so many is not trained on."""
DRAWS = 20
State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a student starts and is trained."""

    start: str = "mean"
    """`mean` of the models' weights, `generalist`, or `students`: the mean of a consolidated student of each task."""
    teacher_share: float = 0.5
    """Of the mean of two models; of more, all have equal shares."""
    norms: str = "mean"
    """Batch-norm statistics of the start: `mean`, `proxy` (measured anew), or `repaired` (measured anew, corrected by
    how far each model's own are from what it has on the proxy)."""
    warm_heads: bool = True
    """All heads start from their teachers' classifiers; else the generalist's alone."""
    head_steps: int = 0
    """Updates of the heads on fixed features before anything else."""
    epochs: int = 5
    crops: int = 3
    batch_size: int = 64
    lr: float = 3e-4
    head_rate: float = 1.0
    weight_decay: float = 0.02
    generalist_weight: float = 0.3
    balanced: bool = False
    """Heads weigh the inverse of the largest KL that a single model has of them."""
    temperatures: tuple[float, float] = (2.0, 2.0)
    """Of the generalist's head, and of all others."""
    confidence: str = ""
    """Weight of each crop's loss: one minus the teacher's relative entropy (`each`), divided among heads (`shared`)."""
    mixup: float = 0.0
    ema: float = 0.0
    heads_first: int = 0
    """Epochs in which only heads move."""
    back_to_start: float = 0.0
    """Share of the start's weights in the result."""
    students: int = 1
    """So many are trained on other orders of the crops; their mean is the result."""


class Tail(nn.Module):
    """What follows the frozen stages: (B, 112, 8, 8) to features (B, F), and to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*copy.deepcopy(list(model.blocks)[STAGES:]))
        self.conv_head, self.bn2 = copy.deepcopy(model.conv_head), copy.deepcopy(model.bn2)
        self.pool, self.classifier = copy.deepcopy(model.global_pool), copy.deepcopy(model.classifier)

    def features(self, maps: torch.Tensor) -> torch.Tensor:
        return self.pool(self.bn2(self.conv_head(self.blocks(maps)))).flatten(1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(maps))


@dataclass(slots=True, kw_only=True)
class Setup:
    """Everything that trainings need."""

    maps: torch.Tensor
    """(CROPS * n, 112, 8, 8) float16 of the proxy's crops, crop by crop."""
    images: int
    """n."""
    tails: dict[str, Tail]
    answers: dict[str, torch.Tensor]
    """{model: (CROPS * n, C) float16 logits}."""
    downstream: dict[str, tuple[torch.Tensor, np.ndarray, np.ndarray]]
    """{task: (maps of training and test images, their classes)}."""
    rivals: dict[str, dict[str, float]]
    """{task: {metric: the better accuracy of teacher and generalist, in %}}."""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(study: Study, teachers: Mapping[str, Path], images: int = 0) -> Setup:
    """Decodes all crops and runs all models over them; `images` of the proxy only, unless 0."""
    models = {GENERALIST: study.generalist} | {name: str(folder) for name, folder in teachers.items()}
    networks = {name: create_model(model).eval() for name, model in models.items()}
    first = networks[GENERALIST]
    inputs = preprocessing_of(first, study.protocol.size)
    tails = {name: Tail(network).eval().to(device()) for name, network in networks.items()}
    pack = study.pack("proxy")
    rows = np.arange(len(pack))[: images or None]
    maps = _maps(first, inputs, pack, _planned(pack, rows))
    answers = {name: _in_parts(tail, maps).half() for name, tail in tails.items()}
    downstream, rivals = {}, {}
    for task in teachers:
        domain, seed = task.rsplit("-", 1)
        downstream[task] = _downstream(first, inputs, study.pack(domain), int(seed), few=bool(images))
        measured = [measure(tails[name], downstream[task], int(seed)) for name in (GENERALIST, task)]
        rivals[task] = {metric: max(each[metric] for each in measured) for metric in measured[0]}
    return Setup(maps=maps, images=len(rows), tails=tails, answers=answers, downstream=downstream, rivals=rivals)


def _planned(pack: ImagePack, rows: np.ndarray) -> Iterable[CropRequest]:
    plan = plan_crops(CropConfig(), pack.hashes[rows], pack.sizes[rows], range(CROPS))
    for crop in range(CROPS):
        numbers = np.full((len(rows), 1), crop)
        boxes, flips = plan.boxes[crop][:, None], plan.flips[crop][:, None]
        yield from CropRequest(images=rows, crops=numbers, boxes=boxes, flips=flips).split(64)


@torch.inference_mode()
def _maps(network: Any, inputs: Preprocessing, pack: ImagePack, requests: Iterable[CropRequest]) -> torch.Tensor:
    frozen = nn.Sequential(network.conv_stem, network.bn1, *list(network.blocks)[:STAGES]).to(device())
    loader, parts = open_loader("torch", pack, (inputs.size,), num_workers=0, device="cpu"), []
    for batch in loader.batches(requests):
        pixels = batch.pixels[inputs.size].to(device())
        parts.append(frozen(normalise(pixels, inputs, torch.float32)).half())
    loader.close()
    return torch.cat(parts)


def _downstream(
    network: Any, inputs: Preprocessing, pack: ImagePack, seed: int, few: bool
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    start, stop = DOWNSTREAM_HALF
    rows, labels, _ = select_classes(pack, ClassSubset(seed=seed, start=start, stop=stop))
    if few:
        rows, labels = rows[labels < 3], labels[labels < 3]
    train, test = probes.split_classes(labels, 0.5, seed)
    maps = _maps(network, inputs, pack, centred_squares(pack, rows[np.concatenate([train, test])], 64))
    return maps, labels[train], labels[test]


@torch.inference_mode()
def _in_parts(work: Any, maps: torch.Tensor) -> torch.Tensor:
    return torch.cat([work(part.float()) for part in maps.split(1024)])


def measure(tail: Tail, data: tuple[torch.Tensor, np.ndarray, np.ndarray], seed: int) -> dict[str, float]:
    """Accuracies in %."""
    maps, train_labels, test_labels = data
    features = _in_parts(tail.eval().features, maps).cpu().numpy()
    train, test = features[: len(train_labels)], features[len(train_labels) :]
    right = {f"knn_{k}": found == test_labels for k, found in probes.knn(train, train_labels, test, (1, 5)).items()}
    right["probe"] = probes.linear_probe(train, train_labels, test, seed).predicted == test_labels
    for shots in (1, 5, 10):
        if shots <= np.bincount(train_labels).min():
            right[f"shot_{shots}"] = probes.few_shot(train, train_labels, test, test_labels, shots, DRAWS, seed)
    return {metric: 100 * float(np.mean(each)) for metric, each in right.items()}


class Student(nn.Module):
    """A tail and a head per model; `names` begin with the generalist."""

    def __init__(self, setup: Setup, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.tail = copy.deepcopy(setup.tails[GENERALIST])
        self.tail.classifier = nn.Identity()
        self.sizes = [setup.answers[name].shape[1] for name in names]
        self.head = nn.Linear(setup.tails[GENERALIST].classifier.in_features, sum(self.sizes))
        self.to(device()).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head(self.tail.features(maps)).split(self.sizes, dim=1)

    @torch.no_grad()
    def take_heads(self, setup: Setup, names: Sequence[str]) -> None:
        """These models' own classifiers."""
        for name, weight, bias in zip(
            self.names, self.head.weight.split(self.sizes), self.head.bias.split(self.sizes), strict=True
        ):
            if name in names:
                weight.copy_(setup.tails[name].classifier.weight)
                bias.copy_(setup.tails[name].classifier.bias)


def mean(states: Sequence[State], shares: Sequence[float]) -> State:
    """The weighted mean of floating-point tensors; others are the first's."""
    return {
        key: sum(share * state[key].double() for share, state in zip(shares, states, strict=True)).to(first.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        if first.is_floating_point()
        else first.clone()
        for key, first in states[0].items()
    }


def student(setup: Setup, recipe: Recipe, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Trains one student of the generalist and the tasks' teachers; a row per task."""
    torch.manual_seed(0)
    names = [GENERALIST, *tasks]
    model = begin(setup, recipe, names)
    weights = _weights(setup, recipe, names)
    if recipe.head_steps:
        learn_heads(model, setup, recipe.head_steps)
    start = _state(model)
    before = held_out_kl(model, setup)
    ends = []
    for number in range(recipe.students):
        model.load_state_dict(start)
        train(model, setup, recipe, weights, seed=number)
        ends.append(_state(model))
    end = mean(ends, [1 / len(ends)] * len(ends))
    model.load_state_dict(mean([end, start], [1 - recipe.back_to_start, recipe.back_to_start]))
    after, rows = held_out_kl(model, setup), []
    for task in tasks:
        figures = measure(model.tail, setup.downstream[task], int(task.rsplit("-", 1)[1]))
        margins = {metric: value - setup.rivals[task][metric] for metric, value in figures.items()}
        rows.append(
            {"task": task, "tasks": list(tasks), "accuracy": figures, "margins": margins, "weights": weights}
            | {"start_kl": before, "kl": after}
        )
    return rows


def begin(setup: Setup, recipe: Recipe, names: Sequence[str]) -> Student:
    """The student before any training."""
    model = Student(setup, names)
    if recipe.start == "students":
        own = [replace(recipe, start="mean", lr=6e-4) for _ in names[1:]]
        parts = [begin(setup, each, (GENERALIST, name)) for each, name in zip(own, names[1:], strict=True)]
        for each, part in zip(own, parts, strict=True):
            train(part, setup, each, _weights(setup, each, part.names), seed=0)
        model.tail.load_state_dict(mean([part.tail.state_dict() for part in parts], [1 / len(parts)] * len(parts)))
    elif recipe.start == "mean":
        shares = [1 - recipe.teacher_share, recipe.teacher_share] if len(names) == 2 else [1 / len(names)] * len(names)
        states = [_state(setup.tails[name]) for name in names]
        model.tail.load_state_dict(mean(states, shares), strict=False)
        if recipe.norms != "mean":
            measure_norms(model.tail, [setup.tails[name] for name in names], shares, setup, recipe.norms)
    model.take_heads(setup, names if recipe.warm_heads else [GENERALIST] if not recipe.head_steps else [])
    return model


def _state(module: nn.Module) -> State:
    return {key: value.clone() for key, value in module.state_dict().items() if not key.startswith("classifier")}


def _weights(setup: Setup, recipe: Recipe, names: Sequence[str]) -> list[float]:
    if not recipe.balanced:
        return [recipe.generalist_weight] + [1.0] * (len(names) - 1)
    far = np.zeros(len(names))
    for name in names:
        model = Student(setup, names)
        model.tail.load_state_dict(_state(setup.tails[name]), strict=False)
        model.take_heads(setup, names)
        far = np.maximum(far, held_out_kl(model, setup))
    return [float(weight) for weight in far.min() / far]


def kl(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B,) KL in nat, times the temperature squared."""
    target = functional.log_softmax(teacher / temperature, 1)
    return (target.exp() * (target - functional.log_softmax(logits.float() / temperature, 1))).sum(1) * temperature**2


@torch.inference_mode()
def held_out_kl(model: Student, setup: Setup) -> list[float]:
    """Per head at temperature 1, on the first crop of the images that are not trained on."""
    model.eval()
    rows = torch.arange(0, setup.images, HELD_OUT, device=setup.maps.device)
    logits = model(setup.maps[rows].float())
    return [
        float(kl(each, setup.answers[name][rows].float(), 1.0).mean())
        for each, name in zip(logits, model.names, strict=True)
    ]


def learn_heads(model: Student, setup: Setup, steps: int) -> None:
    """The heads alone, on fixed features of each image's first crop."""
    features = _in_parts(model.eval().tail.features, setup.maps[: setup.images]).clone()
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(0, setup.images, (512,), device=features.device)
        logits = model.head(features[rows]).split(model.sizes, dim=1)
        losses = [
            kl(each, setup.answers[name][rows].float(), 2.0).mean()
            for each, name in zip(logits, model.names, strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()


def train(model: Student, setup: Setup, recipe: Recipe, weights: Sequence[float], seed: int) -> None:
    """AdamW with one cosine cycle; batch-norm statistics stay."""
    backbone = param_groups_weight_decay(model.tail, recipe.weight_decay)
    heads = param_groups_weight_decay(model.head, recipe.weight_decay)
    optimizer = torch.optim.AdamW([*backbone, *heads], lr=recipe.lr, fused=True)
    rows = np.flatnonzero(np.arange(setup.images) % HELD_OUT)
    per_epoch = -(-len(rows) // recipe.batch_size)
    total, warmup, step = per_epoch * recipe.epochs, min(per_epoch, per_epoch * recipe.epochs // 2), 0
    averaged = _state(model)
    order = np.random.default_rng(seed)
    for epoch in range(recipe.epochs):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        shuffled = torch.from_numpy(order.permutation(rows) + epoch % recipe.crops * setup.images)
        for batch in shuffled.to(setup.maps.device).split(recipe.batch_size):
            cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, total - warmup)))
            rate = recipe.lr * ((step + 1) / warmup if step < warmup else cosine)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for group in optimizer.param_groups[: len(backbone)]:
                group["lr"] = rate if epoch >= recipe.heads_first else 0.0
            for group in optimizer.param_groups[len(backbone) :]:
                group["lr"] = rate * recipe.head_rate
            loss = batch_loss(model, setup, recipe, weights, batch, order)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if recipe.ema:
                keep = min(recipe.ema, (1 + step) / (10 + step))
                averaged = mean([averaged, _state(model)], [keep, 1 - keep])
    if recipe.ema:
        model.load_state_dict(averaged)


def batch_loss(
    model: Student,
    setup: Setup,
    recipe: Recipe,
    weights: Sequence[float],
    rows: torch.Tensor,
    random: np.random.Generator,
) -> torch.Tensor:
    """The weighted sum over heads of the mean KL of a batch."""
    maps, answers = setup.maps[rows].float(), [setup.answers[name][rows].float() for name in model.names]
    share = float(random.beta(recipe.mixup, recipe.mixup)) if recipe.mixup else 1.0
    if recipe.mixup:
        maps = share * maps + (1 - share) * maps.flip(0)
    with torch.autocast(maps.device.type, torch.bfloat16):
        logits = model(maps.contiguous(memory_format=torch.channels_last))
    sure = [_confidence(answer) for answer in answers] if recipe.confidence else []
    losses = []
    for number, (each, answer) in enumerate(zip(logits, answers, strict=True)):
        temperature = recipe.temperatures[min(number, 1)]
        loss = kl(each, answer, temperature)
        if recipe.mixup:
            loss = share * loss + (1 - share) * kl(each, answer.flip(0), temperature)
        if sure:
            loss = loss * sure[number]
        if recipe.confidence == "shared":
            loss = loss * len(sure) / sum(sure)
        losses.append(weights[number] * loss.mean())
    return torch.stack(losses).sum()


def _confidence(answers: torch.Tensor) -> torch.Tensor:
    """(B,) one minus the entropy over its largest possible value."""
    logs = functional.log_softmax(answers, 1)
    return 1 + (logs.exp() * logs).sum(1) / np.log(answers.shape[1])


@torch.inference_mode()
def measure_norms(tail: Tail, models: Sequence[Tail], shares: Sequence[float], setup: Setup, how: str) -> None:
    """Sets each batch norm's statistics to those of its input on the proxy, the first norm first."""
    maps = setup.maps[:: max(1, len(setup.maps) // 2048)].float()
    own, others = _norms(tail), [_norms(model) for model in models]
    seen = [_inputs(model, maps) for model in models]
    for place, norm in enumerate(own):
        average, variance = _inputs(tail, maps)[place]
        if how == "repaired":
            for share, norms, inputs in zip(shares, others, seen, strict=True):
                average = average + share * (norms[place].running_mean - inputs[place][0])
            ratio = [
                share * norms[place].running_var / inputs[place][1].clamp_min(1e-8)
                for share, norms, inputs in zip(shares, others, seen, strict=True)
            ]
            variance = variance * torch.stack(ratio).sum(0).clamp(0.2, 5)
        norm.running_mean.copy_(average)
        norm.running_var.copy_(variance)


def _norms(tail: nn.Module) -> list[Any]:
    return [module for module in tail.modules() if isinstance(module, nn.BatchNorm2d)]


def _inputs(tail: Tail, maps: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance per channel of what reaches each batch norm."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found[id(module)] = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3))

    handles = [norm.register_forward_pre_hook(look) for norm in _norms(tail)]
    tail.eval().features(maps)
    for handle in handles:
        handle.remove()
    return [found[id(norm)] for norm in _norms(tail)]
