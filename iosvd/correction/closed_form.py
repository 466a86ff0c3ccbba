"""Refit the sites of one block, group by group in the order of their use, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from iosvd.correction.base import CorrectionInputs
from iosvd.correction.drift import Drift, DriftSums
from iosvd.correction.pair import BlockPair
from iosvd.correction.refit_options import RefitOptions
from iosvd.correction.site_refit import refitted
from iosvd.layers.replacement import compressed_layer
from iosvd.types import Site


def closed_form_(
    pair: BlockPair, sites: Mapping[str, Site], inputs: CorrectionInputs, options: RefitOptions
) -> dict[str, Site]:
    """Return the sites of a block refitted, and install them in its twin.

    The sites of a group share an input, which is that behind the groups refitted before.

    Args:
        pair: the block; its layout names the sites to be refitted.
        sites: truncated, by their names within the block.
        inputs: of the correction.
        options: of the refit.
    """
    found = dict(sites)
    for group in pair.layout.groups:
        if not options.dense_sites and all(sites[name].factors is None for name in group):
            continue
        drifts = _drifts(pair, group, options)
        for name in group:
            layer = pair.dense.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            found[name] = refitted(inputs, options, sites[name], layer, *drifts)
            pair.twin.set_submodule(name, compressed_layer(layer, found[name]))
    return found


def _drifts(
    pair: BlockPair, group: Sequence[str], options: RefitOptions
) -> tuple[Drift, Drift | None]:
    """Return the drift of a group's input on most windows, and on the held-out ones."""
    first_held = max(1, round((1 - options.held_out) * len(pair.states.states)))
    fitted, held = DriftSums(), DriftSums()
    for where, x_d, x_c, lacking in pair.site_inputs(group, options.stream):
        cut = min(max(first_held - where.start, 0), len(x_d))
        for sums, part in ((fitted, slice(cut)), (held, slice(cut, None))):
            if len(x_d[part]):
                at = range(where.start, where.start + len(x_d))[part]
                rows = partial(pair.states.rows, which=slice(at.start, at.stop))
                lacks = None if lacking is None else rows(lacking[part])
                sums.add(rows(x_d[part]), rows(x_c[part]), lacks)
    return fitted.means(), held.means() if held.tokens else None
