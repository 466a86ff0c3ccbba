"""The common base of whitenings on both sides: it stabilises both metrics and takes their roots."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from iosvd.errors import ConfigError, check_at_least
from iosvd.linalg import DiagonalRoot, Root, RootKind, root_of, shrunk
from iosvd.models.sites import layer_and_role
from iosvd.statistics.output_tokens import OutputTokens
from iosvd.types import Whitener


@dataclass(frozen=True)
class DoubleSided:
    """Options of an input metric R and an output metric C, and their roots.

    Damping makes a metric regular; shrinkage and the choice of tokens make an estimate from few
    tokens more reliable. A shrinkage a is a damping of a / (1 − a) that keeps the metric's trace.

    Sites whose role is not in `output_metric_roles` have only the mean of C's diagonal as output
    metric, the same for all outputs: only their inputs whiten them, and their σ² stay comparable
    with those of other sites.
    """

    damping_input: float = 1e-6  # Relative to the mean diagonal of R.
    damping_output: float = 1e-6  # Relative to the mean diagonal of C.
    shrinkage_input: float = 0.0  # a of (1 − a) R + a mean(diag R) I.
    shrinkage_output: float = 0.0  # The same of C.
    clip_norms: list[float] | None = None  # Of C's cotangents; see OutputTokens.
    left_out: float = 0.0  # Share of a window's tokens at each end that C leaves out.
    root: RootKind = RootKind.cholesky
    # By glob on the role, such as self_attn.q_proj, or its last part; the papers' are all. Third
    # parties leave out q and k (METHODS 3).
    output_metric_roles: list[str] = field(default_factory=lambda: ["*"])

    def __post_init__(self) -> None:
        check_at_least(0, damping_input=self.damping_input, damping_output=self.damping_output)
        for name in ("shrinkage_input", "shrinkage_output"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name):g} is outside [0, 1]")
        _ = self.output_tokens

    @property
    def output_tokens(self) -> OutputTokens:
        """The tokens that C is a mean over."""
        return OutputTokens(self.clip_norms, self.left_out)

    def roots(self, site: str, metric_in: Tensor, metric_out: Tensor, kind: str) -> Whitener:
        """Return the roots of R (n, n) and C (m, m); `kind` names C in errors."""
        return Whitener(
            left=self._left(site, metric_out, f"the {kind} metric of {site}"),
            right=root_of(
                shrunk(metric_in, self.shrinkage_input),
                self.damping_input,
                self.root,
                f"the input metric of {site}",
            ),
        )

    def _left(self, site: str, metric: Tensor, what: str) -> Root:
        role = layer_and_role(site)[1]
        names = (role, role.rpartition(".")[2])
        if any(fnmatchcase(name, p) for name in names for p in self.output_metric_roles):
            return root_of(
                shrunk(metric, self.shrinkage_output), self.damping_output, self.root, what
            )
        diagonal = metric.diagonal()
        return DiagonalRoot(diagonal.mean().sqrt().expand_as(diagonal))
