"""The part of `make gpu` for the losses: Sinkhorn-Knopp with DINO's and iBOT's cross-entropies, forward and backward.

Every kernel is checked in bfloat16 against float64 on fresh inputs into poisoned memory, by the norm of the
difference; then the whole way from teacher logits to the student's gradient is timed eager, compiled and ours, and the
prototype layer with its loss with logits stored and in chunks. Needs torch, numpy and triton only.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

TEACHER, STUDENT, BOTTLENECK = 0.06, 0.1, 384
SETTINGS = (  # loss, student rows, teacher rows, prototypes: of 32 images per GPU, and of 128 with a smaller head
    ("dino", 320, 64, 131072),
    ("ibot", 2458, 2458, 131072),
    ("ibot", 9830, 9830, 65536),
)
CLOSE = {"columns": 1e-4, "loss": 1e-3, "gradient": 1e-2, "gradient_of_prototypes": 1e-2}
"""Relative norms of the difference that pass; bfloat16 gradients are exact ones, rounded (2e-3)."""


def losses(torch: Any, document: dict[str, Any], median_seconds: Any) -> dict[str, Any]:
    """{"checks": relative errors, "timings": rows}."""
    checks: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    document["losses"] = {"checks": checks, "timings": rows}
    for checked in (("dino", 60, 12, 4099), ("ibot", 70, 70, 65536)):
        try:
            checks.append(check(torch, document, *checked))
        except Exception as error:  # the times tell something as well
            document["failures"].append(f"check of {checked}: {type(error).__name__}: {str(error)[:300]}")
    for setting in SETTINGS:
        rows.append(streaming(torch, document, median_seconds, *setting))
        torch.cuda.empty_cache()
    rows.append(chunked(torch, document, median_seconds, *SETTINGS[1]))
    torch.cuda.empty_cache()
    return {"checks": checks, "timings": rows}


def check(torch: Any, document: dict[str, Any], loss: str, rows: int, teachers: int, prototypes: int) -> dict[str, Any]:
    """Relative errors of columns, loss and gradients in bfloat16 against float64."""
    from training.kernels import cross_entropy
    from training.kernels import prototypes as chunks
    from training.kernels.sinkhorn import sinkhorn_columns
    from training.losses import Targets, streaming
    from training.model import Factored

    kernels = streaming.Backend(cross_entropy.row_losses, cross_entropy.gradient)
    teacher, student, weights = inputs(torch, rows, teachers, prototypes)
    with poisoned(torch):
        columns = sinkhorn_columns(teacher, TEACHER)
    exact_columns = float64_columns(torch, teacher)
    targets = Targets(teacher, TEACHER, columns)
    wide = Targets(teacher.double(), TEACHER, exact_columns)

    def of(logits: Any, targets: Any, backend: Any, module: Any = streaming) -> Any:
        if loss == "dino":
            return module.dino_loss(logits, targets, STUDENT, backend)
        return module.ibot_loss(logits, targets, weights, 64, STUDENT, backend)

    def exact(logits: Any) -> Any:
        matrix = torch.softmax(wide.logits / TEACHER + exact_columns, 1)
        if loss == "dino":
            first, second = matrix.chunk(2)
            matrix = torch.cat([second, first, *[first + second] * (rows // len(first) - 2)])
            return -(matrix * torch.log_softmax(logits / STUDENT, 1)).sum() / (2 * rows - teachers)
        return -(weights.double()[:, None] * matrix * torch.log_softmax(logits / STUDENT, 1)).sum() / 64

    with poisoned(torch):
        value = of(student.requires_grad_(), targets, kernels)
        (gradient,) = torch.autograd.grad(value, student)
    exact_student = student.detach().double().requires_grad_()
    exact_value = exact(exact_student)
    (exact_gradient,) = torch.autograd.grad(exact_value, exact_student)

    features = torch.nn.functional.normalize(torch.randn(rows, BOTTLENECK, device="cuda"), dim=1).bfloat16()
    matrix = torch.randn(prototypes, BOTTLENECK, device="cuda") / BOTTLENECK**0.5
    factored = Factored(features.requires_grad_(), matrix.requires_grad_())
    with poisoned(torch):
        factored_value = of(factored, targets, kernels, chunks)
        of_features, of_prototypes = torch.autograd.grad(factored_value, factored)
    exact_parts = [part.detach().double().requires_grad_() for part in (features, matrix.bfloat16())]
    exact_factored = exact(exact_parts[0] @ exact_parts[1].T)
    exact_of = torch.autograd.grad(exact_factored, exact_parts)
    pairs = {
        "columns": (columns - columns.mean(), exact_columns - exact_columns.mean()),
        "loss": (value, exact_value),
        "gradient": (gradient, exact_gradient),
        "loss_in_chunks": (factored_value, exact_factored),
        "gradient_of_features": (of_features, exact_of[0]),
        "gradient_of_prototypes": (of_prototypes, exact_of[1]),
    }
    found = {}
    for name, (got, wanted) in pairs.items():
        found[name] = float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())
        if not found[name] < CLOSE.get(name, 1e-2):
            document["failures"].append(f"{loss} {rows} x {prototypes}: {name} differs by {found[name]:.1e}")
    again = sinkhorn_columns(teacher, TEACHER)
    repeated = torch.autograd.grad(of(student, targets, kernels), student)[0]
    if not (torch.equal(columns, again) and torch.equal(gradient, repeated)):
        document["failures"].append(f"{loss} {rows} x {prototypes}: equal runs gave other bits")
    return {"loss": loss, "rows": rows, "prototypes": prototypes, "relative_errors": found}


def streaming(
    torch: Any,
    document: dict[str, Any],
    median_seconds: Any,
    loss: str,
    rows: int,
    teachers: int,
    prototypes: int,
) -> dict[str, Any]:
    """Seconds, peak memory and bytes from teacher logits to the student's gradient, three ways."""
    from training.kernels import cross_entropy
    from training.kernels.sinkhorn import sinkhorn_columns
    from training.losses import SinkhornKnopp
    from training.losses.choice import Streamed, WithMatrices
    from training.losses.streaming import Backend

    sets = [inputs(torch, rows, teachers, prototypes) for _ in range(2)]
    kernels = Streamed(Backend(cross_entropy.row_losses, cross_entropy.gradient))

    def run(cross_entropies: Any, centering: Any) -> Callable[[Any, Any, Any], Any]:
        def whole(teacher: Any, student: Any, weights: Any) -> Any:
            targets = cross_entropies.targets(centering, teacher, TEACHER)
            if loss == "dino":
                return cross_entropies.dino(student, targets, STUDENT)
            return cross_entropies.ibot(student, targets, weights, 64, STUDENT)

        return whole

    torch._dynamo.reset()
    eager = run(WithMatrices(), SinkhornKnopp())
    ways = {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "ours": run(kernels, SinkhornKnopp(columns=sinkhorn_columns)),
    }
    # Three column passes and two row passes over the teacher; then both forward, both and the gradient backward.
    moved = 2 * (7 * teachers + 3 * rows) * prototypes
    row: dict[str, Any] = {"loss": loss, "rows": rows, "teacher_rows": teachers, "prototypes": prototypes}
    row["bytes_ours"] = moved
    for way, whole in ways.items():

        def step(number: int, whole: Any = whole) -> Any:
            teacher, student, weights = sets[number % 2]
            return torch.autograd.grad(whole(teacher, student.requires_grad_(), weights), student)

        row[way] = timed(torch, document, median_seconds, step, f"{loss} {rows} x {prototypes}, {way}")
        if way == "ours" and isinstance(row[way], dict):
            rate = moved / row[way]["median_s"]
            row[way]["share_of_bandwidth"] = rate / document["ceilings"]["bytes_per_s"]
    return row


def chunked(
    torch: Any,
    document: dict[str, Any],
    median_seconds: Any,
    loss: str,
    rows: int,
    teachers: int,
    prototypes: int,
) -> dict[str, Any]:
    """Prototype layer and loss to the gradients of features and prototypes: seconds and peak memory, two ways."""
    from training.kernels import cross_entropy
    from training.kernels import prototypes as chunks
    from training.losses import Targets, streaming
    from training.model import Factored

    kernels = streaming.Backend(cross_entropy.row_losses, cross_entropy.gradient)
    teacher, _, weights = inputs(torch, rows, teachers, prototypes)
    targets = Targets(teacher, TEACHER, torch.randn(prototypes, device="cuda"))
    features = torch.nn.functional.normalize(torch.randn(rows, BOTTLENECK, device="cuda"), dim=1).bfloat16()
    matrix = torch.randn(prototypes, BOTTLENECK, device="cuda", requires_grad=True)
    features.requires_grad_()

    def stored(_: int) -> Any:
        logits = torch.nn.functional.linear(features, matrix.to(features.dtype))
        value = streaming.ibot_loss(logits, targets, weights, 64, STUDENT, kernels)
        return torch.autograd.grad(value, (features, matrix))

    def in_chunks(_: int) -> Any:
        value = chunks.ibot_loss(Factored(features, matrix), targets, weights, 64, STUDENT, kernels)
        return torch.autograd.grad(value, (features, matrix))

    row: dict[str, Any] = {"loss": f"prototype layer + {loss}", "rows": rows, "prototypes": prototypes}
    for way, step in (("stored", stored), ("chunked", in_chunks)):
        row[way] = timed(torch, document, median_seconds, step, f"prototype layer {rows} x {prototypes}, {way}")
    return row


def timed(torch: Any, document: dict[str, Any], median_seconds: Any, step: Callable[[int], Any], name: str) -> Any:
    """Figures of one way; what fails is said, and the other figures are worth having."""
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = median_seconds(torch, step, 10)
        return {**seconds, "peak_bytes_above_inputs": torch.cuda.max_memory_allocated() - before}
    except Exception as error:
        document["failures"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        return "failed"


def inputs(torch: Any, rows: int, teachers: int, prototypes: int) -> tuple[Any, Any, Any]:
    """(teacher logits, student logits, weights of patches): cosines, as the heads give them."""
    random = [torch.randn(n, prototypes, device="cuda").mul_(0.2).bfloat16() for n in (teachers, rows)]
    return *random, torch.rand(rows, device="cuda")


def float64_columns(torch: Any, teacher: Any) -> Any:
    """Column potentials of three iterations."""
    x = teacher.double() / TEACHER
    of_row, of_column = x.new_zeros(len(x), 1), x.new_zeros(1, x.shape[1])
    share = torch.tensor(x.shape[1] / len(x), device="cuda", dtype=torch.float64).log()
    for _ in range(3):
        of_column = -(torch.logsumexp(x + of_row, 0, keepdim=True) + share)
        of_row = -torch.logsumexp(x + of_column, 1, keepdim=True)
    return of_column[0]


@contextlib.contextmanager
def poisoned(torch: Any) -> Iterator[None]:
    """Memory that torch gives begins as NaN: it does so where it is told to be deterministic."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
