"""Which experts of a mixture see enough of the calibration set to be compressed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor, nn

from iosvd.errors import ModelError
from iosvd.models.forward import evaluation
from iosvd.models.linear_form import expert_of
from iosvd.system.progress import track
from iosvd.windows import Windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def without_idle_experts(
    model: PreTrainedModel, windows: Windows, sites: Mapping[str, nn.Linear], batch_size: int
) -> dict[str, nn.Linear]:
    """Return the sites without those of experts that too few tokens are routed to.

    Such a layer sees fewer tokens than it has inputs, so that R = E[x xᵀ] has no full rank and the
    directions that it lacks would be cut off. It stays dense and is not counted by the ratio, which
    a warning says. Costs a forward pass over the calibration set if the model has experts.

    Args:
        model: a causal language model.
        windows: that calibrate.
        sites: target layers by qualified name.
        batch_size: windows per forward pass.

    Raises:
        ModelError: no site is left.
    """
    routed = {name: site for name, site in sites.items() if expert_of(model, name) is not None}
    if not routed:
        return dict(sites)
    seen = routed_tokens(model, windows, routed, batch_size)
    few = [name for name, site in routed.items() if seen[name] < site.in_features]
    idle = dict.fromkeys(few)  # In order, of thousands.
    if len(idle) == len(sites):
        raise ModelError(
            "all sites are layers of experts, and each sees fewer tokens than it has inputs; raise"
            " calibration.windows"
        )
    if idle:
        least = min(idle, key=lambda name: seen[name])
        log.warning(
            "%d of %d layers of experts stay dense and are not counted by the ratio: they see fewer"
            " tokens than they have inputs (%s: %d); calibrate with more windows",
            *(len(idle), len(routed), least, seen[least]),
        )
    return {name: site for name, site in sites.items() if name not in idle}


def active_sites(model: PreTrainedModel, sites: Iterable[str]) -> list[str]:
    """Return the sites that compute for one token, those of the first experts for the chosen ones.

    Models whose configuration does not say how many experts a token has count all of them.
    """
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return [
        name
        for name in sites
        if chosen is None or (number := expert_of(model, name)) is None or number < chosen
    ]


def routed_tokens(
    model: PreTrainedModel, windows: Windows, sites: Mapping[str, nn.Module], batch_size: int
) -> Counter[str]:
    """Return the number of tokens that reach each of these layers."""
    seen: Counter[str] = Counter()
    with ExitStack() as stack, evaluation(model):
        for name, site in sites.items():

            def see(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] += given[0].shape[:-1].numel()

            stack.callback(site.register_forward_pre_hook(see).remove)
        starts = range(0, len(windows), batch_size)
        for start in track(starts, len(starts), "routing", "batch"):
            windows[start : start + batch_size].output(model)
    return seen
