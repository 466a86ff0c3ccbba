"""The Kronecker product nearest to the Fisher matrix of a weight (GFWSVD, arXiv 2505.17974).

With G_s the gradient (m, n) of window s, the Fisher E[vec(G_s) vec(G_s)ᵀ] is approximated by a
Kronecker product of B (m, m) and A (n, n). Rearranged (Van Loan and Pitsianis) it is a matrix whose
first singular pair is vec(B), vec(A); each half of a power iteration,

    B ← E[G_s A G_sᵀ]   and   A ← E[G_sᵀ B G_s],   the other factor of unit norm,

is a sum over windows. Nothing of the Fisher's size is formed and no gradient is kept; the price is
one pass over the calibration set per half. The first starts from A = I and gives
E[G_s G_sᵀ]. This is not the pair of marginal covariances, whose product leaves out what couples
the two sides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class KroneckerSums:
    """Alternating power iterations for all sites, one half per pass."""

    left: dict[str, Tensor] = field(default_factory=dict)  # B by site, (m, m)
    right: dict[str, Tensor] = field(default_factory=dict)  # A by site, (n, n)
    sums: dict[str, Tensor] = field(default_factory=dict)
    _updates_left: bool = True

    def add(self, site: str, gradient: Tensor) -> None:
        """Add one window's gradient (m, n) to the half that is being updated."""
        g = gradient if self._updates_left else gradient.T
        other = (self.right if self._updates_left else self.left).get(site)
        term = g @ g.T if other is None else g @ other @ g.T
        self.sums[site] = self.sums[site].add_(term) if site in self.sums else term

    def finish_pass(self, windows: int, last: bool) -> None:
        """Make the sums the new factor; but for the last pass, of unit norm for the next to use."""
        updated = self.left if self._updates_left else self.right
        for site, total in self.sums.items():
            factor = (total + total.T) / (2 * windows)
            norm = factor.norm()
            updated[site] = factor if last or norm == 0 else factor / norm
        self.sums.clear()
        self._updates_left = not self._updates_left
