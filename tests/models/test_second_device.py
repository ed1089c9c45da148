"""The second device refuses what a graphics card refuses, and computes what the CPU computes."""

import importlib.util
from pathlib import Path

import pytest
import torch

# By itself: its package is for a running ComfyUI.
FILE = Path(__file__).parents[1] / "second_device" / "tensors.py"
spec = importlib.util.spec_from_file_location("second_device_tensors", FILE)
second = importlib.util.module_from_spec(spec)
spec.loader.exec_module(second)
DEVICE, There, inside = second.DEVICE, second.There, second.inside


MISTAKES = {
    "sum": lambda there, here: there + here,
    "cat": lambda there, here: torch.cat([there, here]),
    "where": lambda there, here: torch.where(there > 0, there, here),
    "mask of another device": lambda there, here: here[there > 0],
    "put": lambda there, here: there.index_put_((torch.tensor([0]),), here[:1]),
    "numpy": lambda there, here: there.numpy(),
    "generator": lambda there, here: torch.randn(
        3, generator=torch.Generator().manual_seed(0), device=there.device
    ),
    "weights": lambda there, here: torch.nn.Linear(3, 3)(there),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_graphics_card_refuses_is_refused(mistake):
    def made():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert isinstance(there, There)
        MISTAKES[mistake](there, here)

    with pytest.raises((RuntimeError, TypeError), match="two devices|a generator of|numpy"):
        inside(made)()


@pytest.mark.parametrize("inference", [False, True])
def test_values_are_those_of_the_cpu(inference):
    def work(device):
        start = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(device)
        start[[0, 1], [1, 2]] = torch.tensor([2.0, 3.0], device=device)
        some = start[torch.tensor([2, 0])].sort(0).values
        some += 1
        return torch.cat([some, start[start > 0].repeat(3)[None, :3]]).cpu()

    with torch.inference_mode(inference):
        there = inside(work)(DEVICE)
        assert type(there) is torch.Tensor
        assert torch.equal(there, work(torch.device("cpu")))


def test_a_net_learns_there_as_on_the_cpu():
    def learned(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.SiLU(), torch.nn.Linear(5, 1))
        net = net.to(device)
        adam = torch.optim.Adam(net.parameters(), lr=0.1)
        x = torch.linspace(0, 1, 12).view(4, 3).to(device)
        for _ in range(3):
            adam.zero_grad()
            net(x).square().mean().backward()
            adam.step()
        return net(x).detach().cpu()

    assert torch.allclose(inside(learned)(DEVICE), learned(torch.device("cpu")))
