"""Gaussians that are being fitted: their steps, their growing in number and their dying out.

As 3DGS (Kerbl et al. 2023, Sec. 5) with Adam and rates of its proportions. Departure: a Gaussian that
is pulled about is always split along its longest axis, into two that cover what it covered; nothing is
drawn at random.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .splats import Splats, rotation_matrices

RATES = {
    "means": 0.1, "rotations": 4e-3, "log_scales": 0.02, "opacities": 0.05, "sh": 0.03, "rest": 1.5e-3,
}  # fmt: skip
"""Of Adam; that of means in units (metres of a template's triangle, or of the Gaussians' spacing)."""
APART, SMALLER = 0.5, 0.6
"""Of a Gaussian's longest standard deviation: how far from it the two that it is split into lie, and
how long they are."""


class GrowingSplats:
    """N Gaussians with Adam's moments; harmonics above degree 0 apart, as they learn slower."""

    def __init__(self, splats: Splats, unit: float) -> None:
        named = dict(
            zip(("means", "rotations", "log_scales", "opacities"), splats.tensors(), strict=False)
        )
        named |= {"sh": splats.sh[:, :1], "rest": splats.sh[:, 1:]}
        self.rates = RATES | {"means": RATES["means"] * unit}
        self.values = {k: v.detach().clone().requires_grad_() for k, v in named.items()}
        groups = [{"params": [v], "name": k} for k, v in self.values.items()]
        self.adam = torch.optim.Adam(groups, eps=1e-15, betas=(0.9, 0.99))
        self.forget()

    def forget(self) -> None:
        """What has pulled at the Gaussians so far."""
        N = len(self)
        self.pulled, self.seen = torch.zeros(2, N, device=self.values["means"].device)

    def __len__(self) -> int:
        return len(self.values["means"])

    @property
    def splats(self) -> Splats:
        """As they are now, for gradients."""
        v = self.values
        sh = torch.cat([v["sh"], v["rest"]], 1)
        return Splats(v["means"], v["rotations"], v["log_scales"], v["opacities"], sh)

    def step(self, share: float) -> None:
        """Adam's, with a share of the rates."""
        for group in self.adam.param_groups:
            group["lr"] = share * self.rates[group["name"]]
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def watch(self, pulls: Tensor, visible: Tensor) -> None:
        """Remember how strongly each was pulled across the picture: [N, 2] and [N]."""
        self.pulled += pulls.norm(dim=1)
        self.seen += visible

    @torch.no_grad()
    def split(self, chosen: Tensor) -> Tensor:  # [n] numbers -> [N + n] the parents of all
        """Each of these becomes two: it takes one half's place, the other is added at the end."""
        v = self.values
        longest = v["log_scales"][chosen].argmax(1)
        axes = rotation_matrices(v["rotations"][chosen])
        axis = axes.gather(2, longest[:, None, None].expand(-1, 3, 1))[..., 0]
        size = v["log_scales"][chosen].amax(1, keepdim=True).exp()
        parents = torch.cat([torch.arange(len(self), device=chosen.device), chosen])
        self._keep(parents, len(self))
        v, N = self.values, len(parents) - len(chosen)
        for at, side in ((chosen, 1), (slice(N, None), -1)):
            v["means"][at] += side * APART * size * axis
        for at in (chosen, torch.arange(N, len(parents), device=chosen.device)):
            v["log_scales"][at, longest] += math.log(SMALLER)
        return parents

    @torch.no_grad()
    def keep(self, chosen: Tensor) -> None:  # [n] numbers
        """Only these."""
        self._keep(chosen, len(self))

    def _keep(self, numbers: Tensor, old: int) -> None:
        """These, in this order; a number's second time starts without momentum."""
        again = torch.zeros(len(numbers), dtype=torch.bool, device=numbers.device)
        again[old:] = True
        for group in self.adam.param_groups:
            (before,), name = group["params"], group["name"]
            state = self.adam.state.pop(before, None)
            after = before.detach()[numbers].clone().requires_grad_()
            group["params"], self.values[name] = [after], after
            if state:
                for moment in ("exp_avg", "exp_avg_sq"):
                    kept = state[moment][numbers]
                    kept[again] = 0
                    state[moment] = kept
                self.adam.state[after] = state
        self.pulled, self.seen = self.pulled[numbers], self.seen[numbers]

    def most_pulled(self, count: int) -> Tensor:  # numbers, rising
        """So many at most, of those that were pulled about most in the pictures that showed them."""
        pull = self.pulled / self.seen.clamp(min=1)
        chosen = pull.argsort(descending=True, stable=True)[: max(0, count)]
        return chosen[pull[chosen] > 0].sort().values


def opaque(splats: Splats, least: float) -> Tensor:  # [n] numbers
    """The Gaussians that can be seen at all."""
    finite = torch.stack([t.flatten(1).isfinite().all(1) for t in splats.tensors() if t.ndim > 1])
    return ((F.sigmoid(splats.opacities) > least) & finite.all(0)).nonzero()[:, 0]
