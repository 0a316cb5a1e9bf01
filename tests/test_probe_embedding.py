"""Failures caught here: an ascent that leaves its ball or does not reach a known optimum; a flip radius that is not the
known one; an attack that does less than noise; a text that is changed by another's attack.
"""

import torch
from test_probe_selection import Few

from dsv4.measure.subjects import small_model, tokens
from dsv4.probe.embedding import Asked, ascend, flip_radii, run
from dsv4.probe.jacobian import without_parameters
from dsv4.probe.subject import Settings, Subject

RATIOS = (0, 4)


def test_a_linear_objective_reaches_its_optimum_and_stays_in_the_ball() -> None:
    """sum_t w_t . delta_t is at most eps sum_t |w_t| |x_t|: within 1%, for each row with its own eps."""
    x, w = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    eps = torch.tensor([0.1, 0.5, 0.0])
    for point in ascend(lambda p: ((p - x) * w).sum(dim=(1, 2)), x, eps, 40, torch.Generator().manual_seed(0)):
        assert ((point - x).norm(dim=2) <= eps[:, None] * x.norm(dim=2) * (1 + 1e-5)).all()
    got = ((point - x) * w).sum(dim=(1, 2))
    want = eps * (w.norm(dim=2) * x.norm(dim=2)).sum(dim=1)
    assert torch.allclose(got, want, rtol=0.01) and got[2] == 0


class Linear(Asked):
    """Two logits, +z and -z, with z = w . x summed over tokens: the argmax changes where z does its sign."""

    def __init__(self, x: torch.Tensor, w: torch.Tensor):
        self.x, self.w, self.ids = x, w, torch.zeros(len(x), x.shape[1])
        self.best = self.logits(x).argmax(dim=1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        z = (x * self.w).sum(dim=(1, 2))
        return torch.stack([z, -z], dim=1)


def test_the_flip_radius_of_a_linear_model_is_known() -> None:
    """|z| / sum_t |w_t| |x_t|, found to the fineness of the bisection from above."""
    torch.manual_seed(3)
    x, w = torch.randn(8, 4, 6), torch.randn(4, 6).expand(8, 4, 6)
    want = (x * w).sum(dim=(1, 2)).abs() / (w.norm(dim=2) * x.norm(dim=2)).sum(dim=1)
    radii, points = flip_radii(Linear(x, w), Settings(), 40, 9)
    assert (radii >= want * 0.999).all() and (radii <= want * 1.05 + 2.0**-9).all()
    assert Linear(x, w).flipped(points).all()
    never, _ = flip_radii(Linear(x, w * 0), Settings(), 3, 2)
    assert never.isinf().all()


def test_each_text_is_attacked_alone() -> None:
    model = small_model(RATIOS)
    ids = torch.stack([tokens(model, 12, seed=s) for s in range(3)])
    with without_parameters(model), torch.no_grad():
        asked = Asked(model, ids)
        clean = asked.margin(asked.x)
        moved = asked.x.clone()
        moved[1] *= -1
        found = asked.margin(moved)
    assert (clean < 0).all(), "the clean argmax is the likeliest"
    assert (found - clean)[1].abs() > 1e-3 and (found - clean)[[0, 2]].abs().max() < 1e-5


def test_the_probe_finds_more_than_noise_does() -> None:
    own, plain = run(Subject(small_model(RATIOS)), Few())
    for record in (own, plain):
        assert record.low <= record.value <= record.high
        assert record.detail["flipped_by_noise_of_that_size"] <= 0.5
        assert record.detail["tokens_with_other_experts"][0] == 0.0, "a hash layer routes by ids"
    assert plain.name.endswith("in place of mHC")
