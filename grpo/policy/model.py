"""The policy as the learner holds it: a transformers model in float32 that reads packed rows and answers with
log-probabilities.

`load_policy` brings a checkpoint folder to that state and proves it (grpo/policy/check.py); `shard_policy` spreads it
over the ranks with FSDP2; `checkpoint_tensors` streams the weights out again under the checkpoint's own names. Knows
nothing of losses, optimizers or engines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from grpo.policy.check import can_share_prompts, check_packing, check_replay, choose_attention
from grpo.policy.compute_copies import ComputeCopies
from grpo.policy.layers import decoder, experts
from grpo.policy.layers.attention import AttentionMode
from grpo.policy.layers.head import SupportHead
from stability import keep_routing as routing_replay


@dataclass(frozen=True, slots=True)
class PolicyModel:
    """A loaded policy or reference."""

    module: PreTrainedModel
    """Parameters, state dict, train/eval and gradients are the module's own; call it through
    `grpo.logprobs.token_logprobs`."""
    head: SupportHead
    routing: routing_replay.RoutingReplay | None
    """None: the model routes by itself (dense model, reference, or keep_routing off)."""
    attention: AttentionMode
    """How it attends over a packed row: `packed`, or a mode with a T x T mask for models that need one."""
    shares_prompts: bool
    """Whether a row may have a shared prompt once (`TrainBatch.parents`)."""
    copies: ComputeCopies
    """The half-precision copies a single rank computes with; not started under FSDP2, which makes its own."""


def load_policy(
    path: str | Path, *, keep_routing: bool, gradient_checkpointing: bool, trainable: bool = True
) -> PolicyModel:
    """Loads a Hugging Face model folder or id in float32 on the CPU and checks that packing and replay work on it.

    Args:
        path: model folder or id.
        keep_routing: install routing replay (a dense model goes without).
        gradient_checkpointing: recompute decoder layers in the backward pass.
        trainable: False freezes every parameter (the reference).

    Raises:
        TypeError: the output layer is not a linear layer without bias.
        UnknownRouterError: `keep_routing` is on and the model's router is not understood.
        ModelCheckError: no attention mode keeps packed sequences apart, or replay or head do not do what they must.
    """
    config = _for_training(AutoConfig.from_pretrained(path))
    module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    return prepare_policy(
        module, keep_routing=keep_routing, gradient_checkpointing=gradient_checkpointing, trainable=trainable
    )


def prepare_policy(
    module: PreTrainedModel, *, keep_routing: bool, gradient_checkpointing: bool, trainable: bool = True
) -> PolicyModel:
    """`load_policy` for a model that is in memory already."""
    module.train(trainable)  # transformers checkpoints only in train mode; nothing random is left in it
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable and ".indexer." not in name)  # an indexer has no gradient path
    copies = ComputeCopies(module)
    experts.install(module, copies)
    attention = choose_attention(module)
    shares_prompts = can_share_prompts(module, attention)
    decoder.install(module)
    routing = routing_replay.install(module) if keep_routing else None
    if gradient_checkpointing and trainable:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module.disable_input_require_grads()  # for adapters; here the embedding is trained
    head = SupportHead(_output_layer(module), copies)
    policy = PolicyModel(module, head, routing, attention, shares_prompts, copies)
    check_replay(policy)
    return policy


def _for_training(config: PretrainedConfig) -> PretrainedConfig:
    """Dropout and router jitter off: a second forward over the same tokens must give the same log-probabilities.

    Nor are layers' states kept to be handed out: that takes memory, and puts hooks in that no other rank can be given.
    """
    for name, value in vars(config).items():
        if isinstance(value, float) and any(noise in name for noise in ("dropout", "pdrop", "jitter")):
            setattr(config, name, 0.0)
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if getattr(config, name, False):
            setattr(config, name, False)
    return config


def _output_layer(module: PreTrainedModel) -> nn.Linear:
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise TypeError(f"{type(module).__name__}: the output layer must be a linear layer without bias, got {head}")
    return head


def shard_policy(policy: PolicyModel, *, compute_dtype: torch.dtype, world_size: int) -> None:
    """Moves the policy to this rank's device and, where there are several ranks, shards it in place with FSDP2.

    Master weights, gradients and their reduction are float32; `compute_dtype` is that of the forward and backward.
    One rank keeps a plain module, with copies of its weights in another `compute_dtype` (a frozen module is held in
    that type instead). Several ranks need an initialised process group; the weights are rank 0's, whatever the others
    hold (`grpo.policy.outline`).

    Raises:
        ModelCheckError: on a GPU, if packed attention is wrong in `compute_dtype`.
    """
    module = policy.module
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if world_size > 1:
        _spread_from_first(module, compute_dtype, device)
    else:
        nn.Module.to(module, device)
        if compute_dtype != torch.float32:
            _compute_in(policy, compute_dtype)
    if device.type == "cuda":
        check_packing(module, policy.attention, compute_dtype, share_prompts=policy.shares_prompts)
        reshard(policy)


def reshard(policy: PolicyModel) -> None:
    """Puts the float32 masters back in the place of compute copies; to be called after the last backward of an update.

    Between a forward and this call the copies are registered as the module's parameters (under FSDP2 only the head's,
    after a forward without a backward): an optimizer built then would train them, and a checkpoint would hold them.
    """
    policy.copies.drop()
    for module in policy.module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _compute_in(policy: PolicyModel, dtype: torch.dtype) -> None:
    """A single rank's other compute type."""
    if any(parameter.requires_grad for parameter in policy.module.parameters()):
        policy.copies.start(dtype)
        return
    for parameter in policy.module.parameters():
        parameter.data = parameter.data.to(dtype)


def _spread_from_first(module: PreTrainedModel, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Rank 0's weights, in shards on all ranks."""
    whole = module.state_dict() if dist.get_rank() == 0 else {}
    _fully_shard(module, compute_dtype)
    nn.Module.to(module, device)
    set_model_state_dict(module, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _fully_shard(module: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """A group per decoder layer, for the embedding, for norm and head; tied weights stay in the root's group."""
    # Inputs come in the right types; a cast would cut the residual stream, which fused layers keep in float32.
    mixed = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy() if compute_dtype == torch.float32 else mixed
    for layer in routing_replay.decoder_layers(module):
        fully_shard(layer, mp_policy=policy)
    embedding, head = module.get_input_embeddings(), _output_layer(module)
    if embedding.weight is not head.weight:
        norm = getattr(module.get_decoder(), "norm", None)
        fully_shard(embedding, mp_policy=policy)
        fully_shard([head] if norm is None else [norm, head], mp_policy=policy, reshard_after_forward=False)
    fully_shard(module, mp_policy=policy)


def checkpoint_tensors(policy: PolicyModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All weights under the names of the Hugging Face checkpoint, one decoder layer in memory at a time.

    Collective: every rank must run it to the end, in step. Parameters come in `dtype`, persistent buffers (such as a
    routing bias, which decides near-ties) in their own; tied weights appear once, as in the checkpoint. Without
    sharding and casting a tensor may be the live weight itself.
    """
    module = policy.module
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied = set(module.all_tied_weights_keys)
    named = ((name, tensor) for name, tensor in module.state_dict().items() if name not in tied)
    for _, group in groupby(named, key=lambda item: _layer_of(item[0])):
        full = {name: _gather(tensor, dtype if name in parameters else tensor.dtype) for name, tensor in group}
        for name, tensor in revert_weight_conversion(module, full).items():
            yield name, tensor.contiguous()


def _layer_of(name: str) -> str:
    """The decoder layer a tensor belongs to, or its own name outside of the layers."""
    match = re.match(r"(.*?\blayers\.\d+)\.", name)
    return match.group(1) if match else name


def _gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(dtype)
