"""Log-probabilities over kept sets on a GPU, against full-vocabulary log-softmax in chunks, measured in the same run.

    python -m benchmarks.kept_logprobs_gpu

The reference never holds more than 4096 rows of logits (bfloat16 product, float32 softmax) and computes them again in
backward, which is what a trainer without recorded sets does. Errors are relative, in the norm, against float64 on the
same bfloat16 inputs; rounding a float64 gradient to bfloat16 alone gives 1.7e-3.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stability.keep_sampling_mask import support_logprobs

REFERENCE_ROWS = 4096
REPEATS, REFERENCE_REPEATS = 30, 5
CHECK_ELEMENTS = 2**26
"""Float64 elements held at once by the exact check."""
GB = 1e9
CHECK_BELOW = 50
"""Mean set size up to which the exact check is cheap enough."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One measurement: N rows, width d, vocabulary V; sets of `mean_set` ids on average, 0 = no truncation."""

    num_rows: int
    width: int
    vocab_size: int
    mean_set: float


SHAPES = (
    Shape(32_768, 2048, 151_936, 8),
    Shape(8192, 2048, 151_936, 8),
    Shape(8192, 7168, 129_280, 8),
    Shape(32_768, 2048, 151_936, 1.5),
    Shape(32_768, 2048, 151_936, 80),
    Shape(8192, 2048, 151_936, 0),
)


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of `support_logprobs` and a gradient to send back."""

    hidden: Tensor
    weight: Tensor
    supports: tuple[Tensor, ...]  # offsets, ids, untruncated, targets, temperature
    upstream: Tensor

    @property
    def targets(self) -> Tensor:
        return self.supports[3]

    @property
    def temperature(self) -> Tensor:
        return self.supports[4]


def make_sets(num_rows: int, vocab_size: int, mean: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, ids and targets of sets of geometric size >= 1; ids are log-uniform, like tokens of real text.

    The target is any id of its set.
    """
    sizes = torch.empty(num_rows).geometric_(1 / mean, generator=generator).long()
    rows = torch.repeat_interleave(2 * sizes + 4)
    ids = vocab_size ** torch.rand(len(rows), generator=generator, dtype=torch.float64)
    pairs = (rows * vocab_size + (ids.long() - 1).clamp_(0, vocab_size - 1)).unique()
    pairs = pairs[torch.rand(len(pairs), generator=generator).argsort()]
    rows, order = (pairs // vocab_size).sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(num_rows))
    kept = torch.arange(len(rows)) - starts[rows] < sizes[rows]
    rows, ids = rows[kept], (pairs[order] % vocab_size)[kept]
    offsets = torch.searchsorted(rows, torch.arange(num_rows + 1))
    chosen = offsets[:-1] + (torch.rand(num_rows, generator=generator) * offsets.diff()).long()
    return offsets, ids, ids[chosen]


def make_case(shape: Shape, device: torch.device) -> Case:
    """Random inputs with logits of about unit variance times three."""
    generator = torch.Generator().manual_seed(0)
    if shape.mean_set:
        offsets, ids, targets = make_sets(shape.num_rows, shape.vocab_size, shape.mean_set, generator)
    else:
        offsets, ids = torch.zeros(shape.num_rows + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        targets = torch.randint(shape.vocab_size, (shape.num_rows,), generator=generator)
    temperature = 0.8 + 0.4 * torch.rand(shape.num_rows, generator=generator)
    supports = (offsets, ids, offsets.diff() == 0, targets, temperature)
    torch.manual_seed(0)
    size = {"dtype": torch.bfloat16, "device": device}
    return Case(
        hidden=torch.randn(shape.num_rows, shape.width, **size).requires_grad_(),
        weight=(torch.randn(shape.vocab_size, shape.width, **size) * (3 / shape.width**0.5)).requires_grad_(),
        supports=tuple(tensor.to(device) for tensor in supports),
        upstream=torch.randn(shape.num_rows, device=device),
    )


class _ChunkedDense(torch.autograd.Function):
    """Full-vocabulary log-probabilities of the targets, `REFERENCE_ROWS` rows of logits at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        lse, z_target = torch.empty(2, len(hidden), device=hidden.device)
        for part in _chunks(len(hidden), REFERENCE_ROWS):
            z = (hidden[part] @ weight.T).float() / temperature[part, None]
            lse[part] = z.logsumexp(-1)
            z_target[part] = z.gather(1, targets[part, None])[:, 0]
        ctx.save_for_backward(hidden, weight, targets, temperature, lse)
        return z_target - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, temperature, lse = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        scale = grads[0] / temperature
        for part in _chunks(len(hidden), REFERENCE_ROWS):
            z = (hidden[part] @ weight.T).float() / temperature[part, None]
            dz = z.sub_(lse[part, None]).exp_().neg_()
            dz.scatter_add_(1, targets[part, None], torch.ones_like(dz[:, :1]))
            dz = dz.mul_(scale[part, None]).to(hidden.dtype)
            grad_hidden[part] = dz @ weight
            grad_weight.addmm_(dz.T, hidden[part])
        return grad_hidden, grad_weight, None, None


def _chunks(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def exact(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and both gradients in float64, by gathered rows."""
    offsets, ids, _, targets, temperature = case.supports
    hidden, weight = case.hidden.detach(), case.weight.detach()
    rows = torch.repeat_interleave(offsets.diff())
    z = torch.empty(len(ids), dtype=torch.float64, device=ids.device)
    parts = list(_chunks(len(ids), CHECK_ELEMENTS // hidden.shape[1]))
    for part in parts:
        z[part] = (weight[ids[part]].double() * hidden[rows[part]].double()).sum(-1) / temperature[rows[part]].double()
    zeros = z.new_zeros(len(targets))
    lse = zeros.index_add(0, rows, z.exp()).log()
    log_p = z - lse[rows]
    is_target = ids == targets[rows]
    logprobs = zeros.index_add(0, rows, log_p * is_target)
    entropy = -zeros.index_add(0, rows, log_p.exp() * log_p)
    dz = (is_target.double() - log_p.exp()) * (case.upstream.double() / temperature.double())[rows]
    grad_hidden, grad_weight = (torch.zeros_like(matrix, dtype=torch.float64) for matrix in (hidden, weight))
    for part in parts:
        grad_hidden.index_add_(0, rows[part], weight[ids[part]].double() * dz[part, None])
        grad_weight.index_add_(0, ids[part], hidden[rows[part]].double() * dz[part, None])
    return logprobs, entropy, grad_hidden, grad_weight


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, without a float64 copy of more than a slice."""
    sizes = [
        ((got[part].double() - want[part]).square().sum(), want[part].square().sum())
        for part in _chunks(len(want), 2**15)
    ]
    difference, size = (float(sum(column)) ** 0.5 for column in zip(*sizes, strict=True))
    return difference / size if size else difference


def time_ms(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median time of a call in a stream of calls, as in training, and of a call that finds the device idle.

    Both are from event to event on the device; the second includes what the host does before the first kernel.
    """
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    alone = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        alone.append(start.elapsed_time(end))
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)), statistics.median(alone)


def peak_gb(call: Callable[[], object]) -> float:
    """Most memory in use during the call, above what was before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GB


def run_ours(case: Case, accumulator: Tensor | None) -> tuple[Tensor | None, ...]:
    """One forward and backward; logprobs, entropy and the gradients."""
    case.hidden.grad = case.weight.grad = None
    logprobs, entropy = support_logprobs(case.hidden, case.weight, *case.supports, weight_grad_accumulator=accumulator)
    logprobs.backward(case.upstream)
    return logprobs.detach(), entropy, case.hidden.grad, case.weight.grad


def run_forward(case: Case) -> object:
    """Log-probabilities without gradient, as for a reference policy."""
    with torch.no_grad():
        return support_logprobs(case.hidden, case.weight, *case.supports)


def run_reference(case: Case) -> None:
    """One forward and backward of the chunked dense log-softmax."""
    case.hidden.grad = case.weight.grad = None
    logprobs = _ChunkedDense.apply(case.hidden, case.weight, case.targets, case.temperature)
    logprobs.backward(case.upstream)  # pyright: ignore[reportAttributeAccessIssue]


def errors(case: Case) -> str:
    """Relative errors of the four results, and of the accumulated gradient."""
    got, want = run_ours(case, None), exact(case)
    names = ("logprobs", "entropy", "dH", "dW")
    texts = [f"{n} {relative_error(g, w):.1e}" for n, g, w in zip(names, got, want, strict=True) if g is not None]
    del got
    accumulator = torch.zeros_like(case.weight, dtype=torch.float32)
    run_ours(case, accumulator)
    texts.append(f"dW accumulated {relative_error(accumulator, want[3]):.1e}")
    return ", ".join(texts)


def measure(shape: Shape, device: torch.device) -> None:
    """Prints one shape's lines."""
    case = make_case(shape, device)
    print(f"\nT={shape.num_rows} d={shape.width} V={shape.vocab_size} bf16, {_describe_sets(case, shape)}")
    accumulator = torch.zeros_like(case.weight, dtype=torch.float32)
    calls: dict[str, Callable[[], object]] = {
        "chunked dense forward+backward": lambda: run_reference(case),
        "forward, no gradient": lambda: run_forward(case),
        "forward+backward": lambda: run_ours(case, None),
        "forward+backward, accumulated dW": lambda: run_ours(case, accumulator),
    }
    reference_ms = None
    print(f"{'':<34} {'ms':>8} {'ratio':>7} {'alone ms':>9} {'peak GB':>8}")
    for name, call in calls.items():
        ms, alone_ms = time_ms(call, REFERENCE_REPEATS if reference_ms is None else REPEATS)
        reference_ms = reference_ms or ms
        case.hidden.grad = case.weight.grad = None
        print(f"{name:<34} {ms:8.3f} {reference_ms / ms:7.1f} {alone_ms:9.3f} {peak_gb(call):8.2f}")
    if 0 < shape.mean_set < CHECK_BELOW:
        print("errors against float64:", errors(case), flush=True)


def _describe_sets(case: Case, shape: Shape) -> str:
    if not shape.mean_set:
        return "no truncation"
    sizes = case.supports[0].diff()
    return f"sets of {sizes.double().mean():.2f} ids (max {sizes.max()}, {(sizes == 1).double().mean():.0%} of one)"


def main() -> None:
    """Prints where this runs and the table of every shape."""
    import triton  # pyright: ignore[reportMissingImports]  comes with CUDA builds of torch only

    device = torch.device("cuda")
    print(f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    print(f"gpu       {torch.cuda.get_device_name(device)}")
    print(f"versions  torch {torch.__version__}, triton {triton.__version__}")
    print("command   python -m benchmarks.kept_logprobs_gpu")
    for shape in SHAPES:
        measure(shape, device)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
