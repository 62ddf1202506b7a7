"""The training part of `make gpu`: 20 whole steps on one GPU, three ways: eager, compiled, compiled with our kernels.
ViT-L/14, whose memory has a target, also with our kernels and the student's logits in chunks.

The trainer's own step (`training.step`) under FSDP2 on a mesh of one, bfloat16, the recipe's crops, drop path .3 (L)
and .1 (S, B), 65,536 prototypes. ViT-L/16 has the fast recipe's shared head and softmax centering; the others
Sinkhorn-Knopp; in the distillation a frozen ViT-L/14 teaches a ViT-S and a ViT-B. Images are made and lie on the GPU,
so neither a loader nor a bus is timed. images/s, peak memory, and MFU over the measured matrix ceiling with the
backbones' operations counted. Ways begin with equal weights and batches, and their losses must agree. Needs torch and
triton only.
"""

import time
from types import SimpleNamespace
from typing import Any, NamedTuple

GLOBAL, LOCAL_CROPS, PROTOTYPES, STEPS = 224, 8, 65536, 20
LIMIT_S = 170
"""No way is begun after so many seconds of this part."""
AGREE = 0.02
"""Relative, of DINO's and iBOT's losses after STEPS: ways differ in bfloat16's rounding. KoLeo is left out: class
tokens that are all alike, as at the beginning, have distances of rounding."""


class Setting(NamedTuple):
    """What is trained."""

    students: tuple[str, ...]
    patch: int
    batch: int
    drop_path: float
    centering: str = "sinkhorn"
    teacher: str | None = None
    local: int = 98


SETTINGS = {
    "ViT-L/16": Setting(("large",), 16, 64, 0.3, "softmax", local=96),
    "ViT-S/14": Setting(("small",), 14, 128, 0.1),
    "ViT-B/14": Setting(("base",), 14, 64, 0.1),
    "distillation": Setting(("small", "base"), 14, 16, 0.0, teacher="large"),
    "ViT-L/14": Setting(("large",), 14, 32, 0.3),
}
REFERENCE = {"attention": "sdpa", "branches": "reference", "losses": "reference", "student_logits": "stored"}
OURS = {"attention": "triton", "branches": "triton", "losses": "triton", "student_logits": "stored"}
WAYS: dict[str, tuple[bool, dict[str, str]]] = {
    "eager": (False, REFERENCE),
    "compiled": (True, REFERENCE),
    "ours": (True, OURS),
}
LEAST_MEMORY = ("ours in chunks", (True, OURS | {"student_logits": "chunked"}))
LEAST_MEMORY_OF = "ViT-L/14"


def training_steps(torch: Any, document: dict[str, Any], median_seconds: Any) -> list[dict[str, Any]]:
    """One row per setting."""
    from training import parallel, step

    device, began = parallel.start(), time.monotonic()
    rows: list[dict[str, Any]] = []
    document["training"] = rows
    # Images lie on the device already, and what lies there can be neither pinned nor sent.
    step.to_device = lambda x, device: x if x.is_cuda else parallel.to_device(x, device)
    for name, setting in SETTINGS.items():
        row: dict[str, Any] = {"model": name, **setting._asdict()}
        rows.append(row)
        for way, (compiled, kernels) in [*WAYS.items(), *([LEAST_MEMORY] if name == LEAST_MEMORY_OF else [])]:
            if time.monotonic() - began > LIMIT_S:
                row[way] = "not measured: out of time"
                continue
            try:
                row[way] = measure(torch, document, median_seconds, setting, compiled, kernels, device)
            except Exception as error:  # the other figures are worth having
                row[way] = f"failed: {type(error).__name__}: {str(error)[:300]}"
                document["failures"].append(f"training of {name}, {way}: {row[way]}")
            torch.cuda.empty_cache()
        compare(row, document)
    step.to_device = parallel.to_device
    parallel.stop()
    return rows


def compare(row: dict[str, Any], document: dict[str, Any]) -> None:
    """Ours over the others in speed and memory; whether all ways learn the same."""
    measured = {way: row[way] for way in [*WAYS, LEAST_MEMORY[0]] if isinstance(row.get(way), dict)}
    for way, figures in measured.items():
        for ours in ("ours", LEAST_MEMORY[0]):
            if ours in measured and not way.startswith("ours"):
                row[f"{ours} over {way}"] = {
                    what: measured[ours][what] / figures[what] for what in ("images_per_s", "peak_bytes")
                }
        for name, value in figures["losses"].items():
            expected = measured.get("eager", figures)["losses"][name]
            if not abs(value - expected) <= AGREE * abs(expected):
                document["failures"].append(f"training of {row['model']}, {way}: {name} {value}, eager {expected}")


def measure(
    torch: Any,
    document: dict[str, Any],
    median_seconds: Any,
    setting: Setting,
    compiled: bool,
    kernels: dict[str, str],
    device: Any,
) -> dict[str, Any]:
    """Figures of one setting, one way."""
    from training.flops import forward_of_crop
    from training.schedules import StepValues
    from training.step import train_step

    torch._dynamo.reset()  # it counts recompilations per line of code, and every setting has other shapes
    models, adam = assemble(torch, setting, compiled, kernels, device)
    losses = SimpleNamespace(dino_weight=1.0, ibot_weight=1.0, koleo_weight=0.1, student_temperature=0.1)
    config = SimpleNamespace(losses=losses, group_size=setting.batch, seed=0, optimizer=adam)
    values = StepValues(1e-4, 1e-4, 0.04, 0.994, 0.05)
    batches = [made_batch(torch, setting, number, device) for number in range(3)]
    torch.cuda.reset_peak_memory_stats()
    figures: dict[str, Any] = {}

    def step(number: int) -> None:
        figures.update(train_step(models, [batches[number % 3]], values, config))

    began = time.monotonic()
    step(0)
    torch.cuda.synchronize()
    first_s = time.monotonic() - began
    timed = median_seconds(torch, step, STEPS, ahead=0)
    found = {f"{learner}/{name}": float(of[name]) for learner, of in figures.items() for name in ("dino", "ibot")}
    flop = 0.0
    for learner in models.learners:
        shape = learner.student.backbone.config
        crops = 2 * forward_of_crop(shape, GLOBAL) + LOCAL_CROPS * forward_of_crop(shape, setting.local)
        flop += setting.batch * 3 * (1 - setting.drop_path) * crops
    flop += setting.batch * 2 * forward_of_crop(models.teacher.backbone.config, GLOBAL)
    return {
        **timed,
        "images_per_s": setting.batch / timed["median_s"],
        "mfu_of_bf16_ceiling": flop / timed["median_s"] / document["ceilings"]["bf16_flop_per_s"],
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "first_step_s": round(first_s, 2),
        "losses": found,
    }


def assemble(torch: Any, setting: Setting, compiled: bool, kernels: dict[str, str], device: Any) -> tuple[Any, Any]:
    """(models, the optimizer's options): what `training.assembly` makes of a configuration, without needing one."""
    from training import parallel
    from training.kernels import choice
    from training.losses import choice as choice_of_losses
    from training.losses import make_centering
    from training.model import SIZES, HeadConfig, Network, VisionTransformerConfig
    from training.optimizer import make_optimizer
    from training.step import Learner, Models

    head = HeadConfig(prototypes=PROTOTYPES)
    spread = SimpleNamespace(replicate=1, precision="bfloat16", compile=compiled, activation_checkpointing=False)
    mesh = parallel.make_mesh(spread, device)
    adam = SimpleNamespace(betas=(0.9, 0.999), layer_decay=1.0, patch_embed_factor=0.2, clip=3.0)
    tied = setting.centering == "softmax"

    def network(size: str, trained: bool) -> Any:
        torch.manual_seed(0)
        shape = VisionTransformerConfig(patch_size=setting.patch, **SIZES[size])
        made = Network(shape, head, None if tied else head).requires_grad_(trained).train(trained).to(device)
        parallel.apply(made, spread, mesh, trained=trained)
        return made

    learners = []
    for size in setting.students:
        student, average = network(size, True), network(size, False)
        if kernels["student_logits"] == "chunked":
            student.use_factored_logits()
        learners.append(Learner(size, student, average, make_optimizer(student, adam), setting.drop_path))
    teacher = learners[0].average if setting.teacher is None else network(setting.teacher, False)
    networks = [teacher, *(of for learner in learners for of in (learner.student, learner.average))]
    choice.use(choice.Chosen(kernels["attention"], kernels["branches"]), networks)
    told = SimpleNamespace(losses=kernels["losses"], student_logits=kernels["student_logits"])
    cross_entropies, columns = choice_of_losses.choose(told, device)
    centerings = [make_centering(setting.centering, PROTOTYPES, columns=columns).to(device) for _ in range(2)]
    return Models(learners, teacher, *centerings, device, cross_entropies), adam


def made_batch(torch: Any, setting: Setting, number: int, device: Any) -> Any:
    """Noise, and masks of the recipe's mean size (on the CPU, where the trainer makes them)."""
    random = torch.Generator().manual_seed(number)
    masks = torch.rand(2 * setting.batch, (GLOBAL // setting.patch) ** 2, generator=random) < 0.3
    masks[1::2] = False
    random = torch.Generator(device).manual_seed(number)

    def noise(crops: int, side: int) -> Any:
        return torch.randn(crops * setting.batch, 3, side, side, generator=random, device=device)

    return SimpleNamespace(
        global_crops=noise(2, GLOBAL),
        local_crops=noise(LOCAL_CROPS, setting.local),
        masks=masks,
        sample_numbers=torch.arange(setting.batch) + number * setting.batch,
        drawn=None,
    )
