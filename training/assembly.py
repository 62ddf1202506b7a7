"""From a configuration to networks with weights, sharded, with their optimizers: what a step then works on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curation.errors import UserError
from training import finishing, parallel
from training.losses import make_centering
from training.losses.choice import choose
from training.model import HeadConfig, Network, VisionTransformerConfig
from training.optimizer import make_optimizer
from training.step import Learner, Models

if TYPE_CHECKING:
    from training.config import HeadsConfig, ModelConfig, TrainConfig

WEIGHTS, STUDENT, HEADS, CONFIG = "model.safetensors", "student.safetensors", "heads.safetensors", "config.json"
"""Of a checkpoint's folder `model`: the average's backbone (what `checkpoint:` embeds with), the student's, the heads
of both, and the shapes."""


def assemble(config: TrainConfig, device: torch.device, initial: str | None = None) -> Models:
    """Networks as the configuration says, from `initial` (a folder `model`) or random weights.

    Raises UserError for a folder that is not one, or of another model.
    """
    cross_entropies, columns = choose(config.kernels, device)
    finish = finishing.choose(config.kernels.augmentation, device)
    mesh = parallel.make_mesh(config.parallel, device)
    if config.distill is None:
        learner = _learner("model", config.model, config.heads, config, mesh, device, initial)
        learners, teacher = [learner], learner.average
    else:
        teacher, heads = _frozen_teacher(config, mesh, device)
        learners = [
            _learner(name, model.model_copy(update={"drop_path": 0.0}), heads, config, mesh, device, None)
            for name, model in config.distill.students.items()
        ]
    dino, ibot = (
        head.last_layer.magnitude.shape[0] for head in (teacher.dino_head, teacher.ibot_head or teacher.dino_head)
    )
    kind, iterations, momentum = (
        config.losses.centering,
        config.losses.sinkhorn_iterations,
        config.losses.center_momentum,
    )
    return Models(
        learners,
        teacher,
        make_centering(kind, dino, iterations, momentum, columns).to(device),
        make_centering(kind, ibot, iterations, momentum, columns).to(device),
        device,
        cross_entropies,
        finish,
    )


def _learner(
    name: str,
    model: ModelConfig,
    heads: HeadsConfig | dict[str, HeadConfig | None],
    config: TrainConfig,
    mesh: Any,
    device: torch.device,
    initial: str | None,
) -> Learner:
    dino, ibot = _head_shapes(heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = Network(model.backbone(), dino, ibot)
    average = copy.deepcopy(student).requires_grad_(False)
    if initial is not None:
        load_networks(initial, student, average)
    if config.kernels.student_logits == "chunked":
        student.use_factored_logits()
    for network, trained in ((student, True), (average, False)):
        network.train(trained).to(device)
        parallel.apply(network, config.parallel, mesh, trained=trained)
    return Learner(name, student, average, make_optimizer(student, config.optimizer), model.drop_path)


def _head_shapes(heads: HeadsConfig | dict[str, HeadConfig | None]) -> tuple[HeadConfig, HeadConfig | None]:
    if isinstance(heads, dict):
        assert heads["dino"] is not None
        return heads["dino"], heads["ibot"]
    return heads.dino.shape(), None if heads.ibot is None else heads.ibot.shape()


def _frozen_teacher(
    config: TrainConfig, mesh: Any, device: torch.device
) -> tuple[Network, dict[str, HeadConfig | None]]:
    assert config.distill is not None
    folder = config.distill.teacher
    document = read_description(folder)
    if "heads" not in document or not (Path(folder) / HEADS).exists():
        raise UserError(
            f"distill.teacher {folder}: has no heads, and the losses need a teacher's; give the folder `model` of a "
            "checkpoint of `curate train`"
        )
    shapes = {name: None if value is None else HeadConfig(**value) for name, value in document["heads"].items()}
    assert shapes["dino"] is not None
    shape = VisionTransformerConfig(**document["model"])
    if any(s.patch_size != shape.patch_size for s in config.distill.students.values()):
        raise UserError(f"distill.students: patch_size is not the teacher's {shape.patch_size} in {folder}")
    teacher = Network(shape, shapes["dino"], shapes["ibot"]).requires_grad_(False).eval()
    load_networks(folder, None, teacher)
    teacher.to(device)
    parallel.apply(teacher, config.parallel, mesh, trained=False)
    return teacher, shapes


def read_description(folder: str) -> dict[str, Any]:
    """config.json of a folder `model`. Raises UserError."""
    path = Path(folder) / CONFIG
    try:
        document = json.loads(path.read_text())
        VisionTransformerConfig(**document["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: not a folder `model` of a checkpoint (config.json: {type(error).__name__}); `curate train` "
            "writes CHECKPOINT/model, `curate export` imports released weights"
        ) from error
    return dict(document)


def load_networks(folder: str, student: Network | None, average: Network) -> None:
    """Weights of a folder `model` into networks that are not sharded yet; positions are resampled for another grid.

    Heads that the folder does not hold stay random, and so do heads of another shape: the averaged backbone is then the
    student's as well. Raises UserError for another backbone.
    """
    from safetensors.torch import load_file

    document = read_description(folder)
    root = Path(folder)
    if not (root / WEIGHTS).exists():
        raise UserError(f"{folder}: has no {WEIGHTS}")
    theirs, ours = document["model"], average.backbone.config.to_dict()
    differing = [
        f"{name} {theirs[name]} there, {ours[name]} here"
        for name in ("patch_size", "width", "depth", "heads", "feed_forward", "registers", "mlp_ratio")
        if name in theirs and theirs[name] != ours[name]
    ]
    if differing:
        raise UserError(
            f"{folder}: holds another model ({'; '.join(differing)}); change `model` or take another folder"
        )
    weights = load_file(root / WEIGHTS)
    own = load_file(root / STUDENT) if (root / STUDENT).exists() else weights
    heads = load_file(root / HEADS) if (root / HEADS).exists() else {}
    for network, backbone, side in ((average, weights, "average"), (student, own, "student")):
        if network is None:
            continue
        network.backbone.load_state_dict(_resampled(backbone, network))
        for name in ("dino_head", "ibot_head"):
            head, prefix = getattr(network, name), f"{side}.{name}."
            state = {key.removeprefix(prefix): value for key, value in heads.items() if key.startswith(prefix)}
            wanted = {} if head is None else head.state_dict()
            if state and {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in wanted.items()}:
                head.load_state_dict(state)


def _resampled(state: dict[str, Tensor], network: Network) -> dict[str, Tensor]:
    """With positions for the network's own grid."""
    count = state["pos_embed"].shape[1] - 1
    grid, wanted = round(count**0.5), network.backbone.grid
    if grid == wanted:
        return state
    patches = state["pos_embed"][:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(patches, size=(wanted, wanted), mode="bicubic", antialias=True)
    positions = torch.cat([state["pos_embed"][:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    return state | {"pos_embed": positions}
