"""What the engine's records are compared with: transformers on the same weights, truncation and routing done by hand.

Shapes: P = prompt tokens, T = sampled tokens, V = vocabulary, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rollout.types import Completion, GenerateRequest, KeptSets

TIE = 1e-5
"""A choice whose margin is below this is decided by rounding, and counts for either side."""


@dataclass(frozen=True)
class Comparison:
    """How one completion's record compares with transformers."""

    logprob_diff: np.ndarray  # float32 [T], recorded minus log-softmax over the recorded kept set
    kept_agrees: np.ndarray  # bool [T], recorded set == transformers' own
    routes_agree: np.ndarray  # bool [P + T - 1, L], as sets


def recorded(completion: Completion) -> tuple[KeptSets, np.ndarray]:
    """The kept sets and routes of a completion that must have both."""
    kept, routes = completion.replay.kept, completion.replay.routed_experts
    assert kept is not None and routes is not None
    return kept, routes


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The transformers model in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def compare(model: PreTrainedModel, request: GenerateRequest, completion: Completion) -> Comparison:
    """Scores the completion with transformers and compares every record of it."""
    num_prompt = len(request.prompt_token_ids)
    token_ids = torch.from_numpy(np.concatenate([request.prompt_token_ids, completion.token_ids]).astype(np.int64))
    with torch.no_grad(), _Routers(model) as routers:
        logits_TV = model(token_ids[None]).logits[0, num_prompt - 1 : -1].float() / request.temperature
    kept = completion.replay.kept
    diffs, agree = [], []
    for t, token in enumerate(completion.token_ids.tolist()):
        ids = torch.arange(logits_TV.shape[1]) if kept is None else torch.from_numpy(kept.row(t)).long()
        logprob = logits_TV[t, token] - torch.logsumexp(logits_TV[t, ids], 0)
        diffs.append(float(completion.behavior_logprobs[t]) - logprob.item())
        agree.append(_same_kept(logits_TV[t], ids, request))
    return Comparison(np.array(diffs, np.float32), np.array(agree, bool), _same_routes(routers.scores, completion))


def _same_kept(logits_V: Tensor, ids: Tensor, request: GenerateRequest) -> bool:
    """Top-k, then top-p over what is left: an id stays while the mass of the likelier ones is below top_p.

    Ids with nearly the same logit may be ranked either way.
    """
    ascending = logits_V.double().sort().values
    mass_of_likeliest = ascending.flip(0)[: request.top_k or None].softmax(0).cumsum(0)
    mass_of_likeliest = torch.cat([mass_of_likeliest.new_zeros(1), mass_of_likeliest])
    num_stay = len(mass_of_likeliest) - 1

    def stays(num_likelier_V: Tensor, top_p: float) -> Tensor:
        return (num_likelier_V < num_stay) & (mass_of_likeliest[num_likelier_V.clamp(max=num_stay)] < top_p)

    surely_likelier_V = len(ascending) - torch.searchsorted(ascending, logits_V.double() + TIE, right=True)
    maybe_likelier_V = len(ascending) - torch.searchsorted(ascending, logits_V.double() - TIE) - 1  # not itself
    may_stay, must_stay = stays(surely_likelier_V, request.top_p + TIE), stays(maybe_likelier_V, request.top_p - TIE)
    kept = torch.zeros_like(may_stay)
    kept[ids] = True
    return not (kept & ~may_stay | must_stay & ~kept).any()


class _Routers:
    """Collects, per decoder layer, the scores that transformers' router chooses by, and how many it takes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.scores: list[tuple[int, Tensor, Tensor]] = []  # layer, choice scores [T, E], own choice [T, K]
        self._model = model
        self._hooks: list[Any] = []

    def __enter__(self) -> _Routers:
        for layer, module in enumerate(self._model.model.layers):
            gate = getattr(module.mlp, "gate", None)
            if gate is not None:
                self._hooks.append(gate.register_forward_hook(self._collector(layer)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _collector(self, layer: int) -> Any:
        def collect(module: Any, _inputs: Any, outputs: Any) -> None:
            scores, chosen = outputs[0], outputs[-1]
            bias = getattr(module, "e_score_correction_bias", None)
            self.scores.append((layer, scores if bias is None else scores.sigmoid() + bias, chosen))

        return collect


def _same_routes(routers: list[tuple[int, Tensor, Tensor]], completion: Completion) -> np.ndarray:
    routes = completion.replay.routed_experts
    if routes is None:
        return np.ones((0, 0), bool)
    columns = []
    for layer, scores, chosen in routers:
        own = chosen[:-1].sort(-1).values
        recorded = torch.from_numpy(routes[:, layer].astype(np.int64)).sort(-1).values
        # The margin between the last expert taken and the first one left.
        ranked = scores[:-1].float().sort(-1, descending=True).values
        margin = ranked[:, own.shape[1] - 1] - ranked[:, own.shape[1]]
        columns.append(((own == recorded).all(-1) | (margin < TIE)).numpy())
    return np.stack(columns, axis=1)
