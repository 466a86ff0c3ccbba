"""Correct decoder blocks in forward order, each behind the blocks that are corrected already.

The dense block runs once on the dense hidden states, and the inputs of its sites are kept. Its
twin, with the truncated layers, is corrected and then takes the compressed hidden states to the
next block. So the dense model is passed once, and the compressed one about three times for the
closed form, mostly in part, and once per epoch of refinement; no site costs a pass of the model.

Every corrected block is stored at once, so a correction that is interrupted resumes at the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from iosvd.cache.calibration import Calibration
from iosvd.cache.keys import options_of
from iosvd.cache.store import Key, get_or_compute
from iosvd.correction.base import CorrectionInputs, CorrectionResult
from iosvd.correction.closed_form import closed_form_
from iosvd.correction.pair import BlockPair
from iosvd.correction.refinement import Refinement
from iosvd.correction.refit_options import RefitOptions
from iosvd.correction.stored_block import BlockUpdate, tensors_of, update_from
from iosvd.layers.replacement import install_, set_parameters_, twin_of
from iosvd.models.blocks import HiddenStates, calls_of, hidden_states_of
from iosvd.models.calls import Call
from iosvd.models.layout import Layout, layout_of
from iosvd.models.linear_form import expert_of
from iosvd.models.sites import named_blocks, names_within
from iosvd.models.visiting import device_of
from iosvd.statistics.block_curvature import block_curvatures
from iosvd.system.progress import track
from iosvd.system.timing import Stage
from iosvd.types import Site


@dataclass(frozen=True)
class BlockSteps:
    """The steps of the correction of a block."""

    closed_form: RefitOptions | None = None  # Experts stay as they are truncated.
    refinement: Refinement | None = None


@torch.no_grad()
def correct_blocks(inputs: CorrectionInputs, steps: BlockSteps) -> CorrectionResult:
    """Return all sites corrected, and other parameters of their blocks that changed.

    The dense model is left as it is.
    """
    model, own = inputs.calibration.model, inputs.calibration
    blocks = named_blocks(model)
    names_by_block = [names_within(start, inputs.sites) for start in blocks]
    inside = {name for names in names_by_block for name in names.values()}
    sizes = (
        steps.refinement.part_sizes(len(own.windows), own.batch_size) if steps.refinement else ()
    )
    calls = calls_of(model, own.windows, own.batch_size, sizes)
    costs: list[Stage] = []
    curvatures = _curvatures(own, steps.refinement, costs)  # Before states take their memory.
    dense_states = hidden_states_of(model, own.windows, own.batch_size)
    # Not by items(), which would truncate every site.
    sites = {name: inputs.sites[name] for name in inputs.sites if name not in inside}
    prefix = twin_of(model) if sites else model
    install_(prefix, sites)
    states = hidden_states_of(prefix, own.windows, own.batch_size)
    parameters: dict[str, Tensor] = {}
    waiting = [
        _BlockWork(number, start, blocks[start], names, block_calls, curvatures.get(number))
        for number, (start, names, block_calls) in enumerate(
            zip(blocks, names_by_block, calls, strict=True)
        )
    ]
    for work in track(waiting, len(waiting), "refit", "block"):
        key = _key(inputs, steps, work.number)
        correct = partial(_corrected, inputs, steps, work, dense_states, states)
        entry, now = get_or_compute(own.store, key, key, correct)
        # Its peak was measured inside, which hides it from the clock of the whole correction.
        costs.append(replace(entry.cost, seconds=0.0 if now else entry.cost.seconds))
        block = work.block
        if not now:
            dense_states.pass_(block, work.calls)
        update = update_from(entry.tensors, work.truncated(inputs), device_of(block))
        twin = twin_of(block)
        install_(twin, update.sites)
        set_parameters_(twin, update.parameters)
        states.pass_(twin, work.calls)
        sites |= {work.names[name]: site for name, site in update.sites.items()}
        parameters |= {f"{work.start}{name}": value for name, value in update.parameters.items()}
        del twin
    ordered = {name: sites[name] for name in inputs.sites}
    return CorrectionResult(ordered, inputs.sites.ranks, parameters, costs)


@dataclass(frozen=True)
class _BlockWork:
    """A block that waits for its correction."""

    number: int
    start: str  # Of the names of its modules.
    block: nn.Module  # Dense.
    names: Mapping[str, str]  # Of its sites: within it, and within the model.
    calls: Mapping[int, Call]
    curvature: Tensor | None

    def truncated(self, inputs: CorrectionInputs) -> dict[str, Site]:
        """Return its truncated sites, by their names within it."""
        return {name: inputs.sites[full] for name, full in self.names.items()}


def _corrected(
    inputs: CorrectionInputs,
    steps: BlockSteps,
    work: _BlockWork,
    dense_states: HiddenStates,
    states: HiddenStates,
) -> dict[str, Tensor]:
    """Correct one block, and take the dense states through it; return the update's tensors."""
    model, block, sites = inputs.calibration.model, work.block, work.truncated(inputs)
    layout, wanted = Layout((), ()), list[str]()
    if steps.closed_form is not None:
        # The compressed model routes tokens otherwise, so an expert's inputs have no partners.
        fitted = [name for name, full in work.names.items() if expert_of(model, full) is None]
        layout = _layout(block, dense_states, work.calls, fitted)
        wanted = ["", *(group[0] for group in layout.groups)]
    reached = dense_states.pass_(block, work.calls, wanted)
    twin = twin_of(block)
    install_(twin, sites)
    pair = BlockPair(
        number=work.number,
        dense=block,
        twin=twin,
        layout=layout,
        reached=reached,
        states=states,
        target=dense_states,
        calls=work.calls,
        curvature=work.curvature,
    )
    update = BlockUpdate(sites, {})
    if steps.closed_form is not None:
        update = BlockUpdate(closed_form_(pair, sites, inputs, steps.closed_form), {})
    if steps.refinement is not None:
        update = steps.refinement.refine_(pair, update.sites)
    return tensors_of(update, block)


def _curvatures(
    own: Calibration, refinement: Refinement | None, costs: list[Stage]
) -> dict[int, Tensor]:
    """Return the KL curvature behind each block, if errors are weighed by it."""
    metric = None if refinement is None else refinement.curvature
    if metric is None:
        return {}

    def compute() -> dict[str, Tensor]:
        on_cpu = own.memory.metrics_on_cpu
        found = block_curvatures(own.model, own.windows, metric, own.batch_size, on_cpu=on_cpu)
        return {str(number): one for number, one in enumerate(found)}

    key = own.keys.curvature(metric)
    entry, now = get_or_compute(own.store, key, key, compute)
    costs.append(replace(entry.cost, seconds=0.0 if now else entry.cost.seconds))
    return {int(number): one for number, one in entry.tensors.items()}


def _key(inputs: CorrectionInputs, steps: BlockSteps, number: int) -> Key:
    names, ranks = list(inputs.sites), inputs.factorised
    return inputs.spectra.block(names, ranks, options_of(steps), number)


def _layout(
    block: nn.Module, states: HiddenStates, calls: Mapping[int, Call], names: Sequence[str]
) -> Layout:
    _, hidden = next(states.batches(device_of(block)))
    return layout_of(block, hidden, calls[len(hidden)], names)
