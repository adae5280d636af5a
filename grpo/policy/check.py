"""Start-up checks of a loaded model, on a few random tokens: packed sequences stay apart, shared prompts are read as
repeated ones, replay reaches every router, and the head's log-probabilities are those of the model's logits. Each
failure here would otherwise be silent and train on wrong numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.policy.layers.attention import MODES, AttentionMode, attention_kwargs, set_attention
from grpo.policy.layers.head import Supports
from stability.keep_routing import decoder_layers

if TYPE_CHECKING:
    from grpo.policy.model import PolicyModel

LENGTHS = (10, 1, 14, 7)
"""The check's sequences: unequal, one of a single token."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest mean |difference| of logits over mean |logit|. Sequences that see each other give 0.3 and more; float32
rounding gives 1e-6, and up to 1e-3 leaves room for one near-tie in a router."""

PARTS = ((0, 0, 6, -1), (2, 0, 5, -1), (3, 0, 6, -1), (0, 6, 10, 0), (0, 6, 8, 0), (2, 5, 14, 1), (3, 6, 7, 2))
"""The same sequences once more, now going on from shared prompts: (sequence, first token, last + 1, parent)."""
_REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError)
"""What models raise that were not written for an attention mode."""


class Trial(NamedTuple):
    """A packed row of the check's sequences."""

    token_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int32 [S + 1]
    parents: Tensor | None  # int32 [S]
    origin: Tensor  # int64 [T], the row's tokens in the sequences laid end to end
    num_checked: int
    """The last rows: all, or those of sequences that go on from shared prompts."""

    def kwargs(self, module: PreTrainedModel, mode: AttentionMode) -> dict:
        """What the model must be called with."""
        return attention_kwargs(module, mode, self.position_ids, self.cu_seqlens, max(LENGTHS), self.parents)


class ModelCheckError(RuntimeError):
    """A model that cannot be trained rightly as it is; the message says what is wrong and what to do."""


def choose_attention(module: PreTrainedModel) -> AttentionMode:
    """Sets and returns the first attention mode in which packed rows equal separate ones.

    Raises:
        ModelCheckError: none does.
    """
    reference = _separate_logits(module)
    reasons = []
    for mode in MODES:
        try:
            set_attention(module, mode)
            error = _packing_error(module, mode, reference, shared=False)
        except _REFUSALS as refusal:
            reasons.append(f"{mode}: {type(refusal).__name__}: {refusal}")
            continue
        if error <= TOLERANCE[torch.float32]:
            return mode
        reasons.append(f"{mode}: logits differ by {error:.1e} of their mean size")
    raise ModelCheckError(
        f"{type(module).__name__}: no attention mode keeps packed sequences apart, so it cannot be trained "
        "here; choose another model.path. Tried " + "; ".join(reasons)
    )


@torch.no_grad()
def can_share_prompts(module: PreTrainedModel, mode: AttentionMode) -> bool:
    """Whether sequences that go on from a shared prompt give the logits of whole ones; to be asked before sharding."""
    trial = _trial(module, shared=True)
    try:
        logits = module(input_ids=trial.token_ids[None], **trial.kwargs(module, mode)).logits[0]
    except _REFUSALS:
        return False
    return _relative_error(logits, logits, trial) <= TOLERANCE[torch.float32]


def check_packing(
    module: PreTrainedModel, mode: AttentionMode, compute_dtype: torch.dtype, *, share_prompts: bool
) -> None:
    """Compares packed with separate once more where training will run: another device, sharded, in `compute_dtype`.

    With `share_prompts` a second row has sequences that go on from shared prompts.

    Raises:
        ModelCheckError: they differ by more than `TOLERANCE[compute_dtype]`.
    """
    module.set_attn_implementation("eager" if mode.startswith("eager") else "sdpa")
    reference = _separate_logits(module)
    set_attention(module, mode)
    for shared in (False, True) if share_prompts else (False,):
        error = _packing_error(module, mode, reference, shared=shared)
        if not error <= TOLERANCE[compute_dtype]:  # also where it is not a number
            raise ModelCheckError(
                f"{type(module).__name__}: packed logits differ from separate ones by {error:.1e} of their mean size "
                f"on {reference.device} in {compute_dtype}, more than {TOLERANCE[compute_dtype]}: set learner.dtype to "
                "float32"
            )


def check_replay(policy: PolicyModel) -> None:
    """Compares the policy's head with its logits, and counts that replayed experts reach every router.

    Raises:
        ModelCheckError: one of them is off.
    """
    trial = _trial(policy.module)
    token_ids, kwargs = trial.token_ids, trial.kwargs(policy.module, policy.attention)
    rows = torch.arange(1, len(token_ids) - 1, 2, device=token_ids.device)
    targets, no_ids = token_ids[rows + 1], rows[:0]
    everything = torch.ones_like(rows, dtype=torch.bool)
    supports = Supports(rows, no_ids.new_zeros(len(rows) + 1), no_ids, everything, targets, everything.float())
    with torch.no_grad():
        logits = policy.module(input_ids=token_ids[None], **kwargs).logits[0]
        with policy.head.over(supports):
            answered = policy.module(input_ids=token_ids[None], **kwargs).logits
    expected = logits[rows].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    is_right = answered.shape == (1, 2, len(rows)) and (answered[0, 0] - expected).abs().mean() <= 1e-3  # nats
    if not is_right:
        raise ModelCheckError(
            f"{type(policy.module).__name__}: the log-probabilities of its head are not those of its logits (does it "
            "scale or cap them?): choose another model.path"
        )
    if policy.routing is not None:
        _check_routing(policy, token_ids, kwargs)


def _check_routing(policy: PolicyModel, token_ids: Tensor, kwargs: dict) -> None:
    assert policy.routing is not None
    num_layers, num_slots = len(decoder_layers(policy.module)), policy.routing.slots_per_token
    slots = torch.arange(num_slots, dtype=torch.int16, device=token_ids.device)
    forced = slots.expand(len(token_ids), num_layers, num_slots)
    with torch.no_grad(), policy.routing.counting():
        policy.module(input_ids=token_ids[None], routed_experts=forced, **kwargs)
    replayed = policy.routing.agreement()[:, 1].tolist()
    policy.routing.reset()
    if any(count != len(token_ids) * num_slots for count in replayed):
        raise ModelCheckError(
            f"{type(policy.module).__name__}: replayed experts reached {replayed} slots of "
            f"{len(token_ids) * num_slots} per MoE layer: set stability.keep_routing = false"
        )


def _trial(module: PreTrainedModel, *, shared: bool = False) -> Trial:
    """The check's sequences end to end; `shared` adds those of `PARTS`, in front of them the prompts."""
    device = next(module.parameters()).device
    vocab_size = module.config.get_text_config().vocab_size
    token_ids = torch.randint(vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])
    begins = torch.tensor([0, *LENGTHS]).cumsum(0)
    pieces = [(i, 0, length, -1) for i, length in enumerate(LENGTHS)]
    parents = None
    if shared:
        pieces += [(i, start, stop, -1 if parent < 0 else parent + len(LENGTHS)) for i, start, stop, parent in PARTS]
        parents = torch.tensor([parent for *_, parent in pieces], dtype=torch.int32).to(device)
    origin = torch.cat([torch.arange(int(begins[i]) + start, int(begins[i]) + stop) for i, start, stop, _ in pieces])
    cu_seqlens = torch.tensor([0, *(stop - start for _, start, stop, _ in pieces)]).cumsum(0).to(torch.int32)
    row = (token_ids[origin].to(device), position_ids[origin].to(device), cu_seqlens.to(device))
    num_checked = sum(stop - start for _, start, stop, parent in pieces if parent >= 0 or not shared)
    return Trial(*row, parents, origin.to(device), num_checked)


@torch.no_grad()
def _separate_logits(module: PreTrainedModel) -> Tensor:
    """The logits [T, V] of the check's sequences run one at a time, in the model's present attention."""
    token_ids = _trial(module).token_ids
    logits = [module(input_ids=part[None], use_cache=False).logits[0] for part in token_ids.split(LENGTHS)]
    return torch.cat(logits)


@torch.no_grad()
def _packing_error(module: PreTrainedModel, mode: AttentionMode, reference: Tensor, *, shared: bool) -> float:
    """Mean |packed - separate| over mean |separate| of all logits."""
    trial = _trial(module, shared=shared)
    logits = module(input_ids=trial.token_ids[None], **trial.kwargs(module, mode)).logits[0]
    return _relative_error(logits, reference, trial)


def _relative_error(logits: Tensor, reference: Tensor, trial: Trial) -> float:
    got, want = logits[-trial.num_checked :], reference[trial.origin[-trial.num_checked :]]
    return float((got - want).abs().mean() / want.abs().mean())
