"""Half-precision copies of one rank: where they are, what their gradients add up to, what tied weights do."""

from __future__ import annotations

import torch
from torch import nn

from grpo.policy.compute_copies import ComputeCopies


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, and a frozen scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.full((4,), 1.2345678), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids) * self.scale)


def test_copies_stand_in_from_forward_to_drop() -> None:
    model = Tied()
    masters = list(model.parameters())
    copies = ComputeCopies(model)
    copies.start(torch.bfloat16)
    assert model(torch.tensor([1, 2])).dtype == torch.bfloat16
    assert model.embed.weight is model.head.weight and model.embed.weight is not masters[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.scale.requires_grad
    copies.drop()
    assert all(a is b for a, b in zip(model.parameters(), masters, strict=True))
    with torch.no_grad():
        model.embed.weight.fill_(3.0)
    model(torch.tensor([1]))
    assert bool((model.embed.weight == 3).all()), "new copies are made from the masters as they are then"


def test_gradients_add_up_in_float32_and_are_those_of_the_rounded_weights() -> None:
    torch.manual_seed(0)
    model = Tied()
    copies = ComputeCopies(model)
    copies.start(torch.bfloat16)
    rounded = Tied().bfloat16()
    rounded.load_state_dict(model.state_dict())
    rounded.head.weight = rounded.embed.weight
    want = torch.zeros(7, 4)
    for ids in (torch.tensor([1, 2, 2]), torch.tensor([0, 6])):
        model(ids).float().square().sum().backward()
        rounded.zero_grad()
        rounded(ids).float().square().sum().backward()
        assert rounded.embed.weight.grad is not None
        want += rounded.embed.weight.grad.float()
    assert all(p.grad is None for p in model.parameters()), "a copy keeps no gradient"
    copies.drop()
    assert model.embed.weight.grad is not None and model.embed.weight.grad.dtype == torch.float32
    assert torch.equal(model.embed.weight.grad, want) and model.scale.grad is None


def test_a_function_may_add_to_the_master_directly() -> None:
    model = Tied()
    copies = ComputeCopies(model)
    copies.start(torch.bfloat16)
    assert copies.gradient_of(model.embed.weight) is None, "no copy yet"
    model(torch.tensor([1]))
    buffer = copies.gradient_of(model.embed.weight)
    assert buffer is not None and copies.gradient_of(model.scale) is None
    buffer += 2
    copies.drop()
    assert model.embed.weight.grad is buffer
