"""The refinement ladder: closed form, block by block, end to end (METHODS 11.3, 11.5, 11.6)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from iosvd.cache.calibration import Calibration
from iosvd.cache.keys import options_of
from iosvd.correction.base import Correction, CorrectionInputs, CorrectionResult
from iosvd.correction.blockwise import BlockSteps, correct_blocks
from iosvd.correction.end_to_end import EndToEnd
from iosvd.correction.refinement import Refinement
from iosvd.correction.refit_options import RefitOptions
from iosvd.correction.work import CorrectionWork, PlannedModel
from iosvd.errors import ConfigError
from iosvd.models.sites import decoder_blocks
from iosvd.models.visiting import device_of
from iosvd.statistics.planning import Work


@dataclass(frozen=True)
class Ladder(Correction):
    """Three rungs, each of which starts from the one before; null leaves one out.

    Before a block is refined, its sites are refitted by the closed form, whose inputs are those
    behind the refined blocks, too. Trust 0 is SVD-LLM's on the compressed prefix (AA-SVD's
    objective 2, the default of its public code), trust 1 is anchored at the dense outputs
    (objective 4, the paper's). Without a closed form the truncated factors are refined.

    Cost of the refinement: two sets of hidden states, one block with its gradients and AdamW's two
    moments, in float32; each epoch is a training step's work of the compressed model.
    """

    closed_form: RefitOptions | None = None
    refinement: Refinement | None = None
    end_to_end: EndToEnd | None = None

    @property
    def needs_metrics(self) -> bool:
        return self.closed_form is not None and self.closed_form.output_metric

    @property
    def adds_bias(self) -> bool:
        return self.closed_form is not None and self.closed_form.bias

    def work(self, planned: PlannedModel) -> CorrectionWork:
        found = CorrectionWork()
        if self.closed_form is not None:
            found += self.closed_form.closed_form_work(planned)
        elif self.refinement is not None:  # Both models still pass from block to block.
            found += CorrectionWork(Work(planned.shapes.body + planned.compressed, 0))
        for training in (self.refinement, self.end_to_end):
            if training is not None:
                found += training.work(planned)
        return found

    def check(self, calibration: Calibration) -> None:
        for training in (self.refinement, self.end_to_end):
            if training is not None:
                training.trained_windows(len(calibration.windows))
        if self.end_to_end is not None and not decoder_blocks(calibration.model):
            raise ConfigError(
                "this model has no list of decoder blocks; set correction.end_to_end=null"
            )
        devices = {device_of(block) for block in decoder_blocks(calibration.model)}
        if self.refinement is not None and len(devices) > 1:
            raise ConfigError(
                f"the decoder blocks are spread over {len(devices)} devices, where block refinement"
                " does not work; set runtime.device_map=null or another correction"
            )

    def __call__(self, inputs: CorrectionInputs) -> CorrectionResult:
        if self.end_to_end is not None:
            self.end_to_end.check_room(inputs)
        result = CorrectionResult(inputs.sites, inputs.sites.ranks)
        if self.closed_form is not None or self.refinement is not None:
            result = correct_blocks(inputs, BlockSteps(self.closed_form, self.refinement))
        if self.end_to_end is None:
            return result
        names, ranks = list(inputs.sites), inputs.factorised
        key = partial(inputs.spectra.training, names, ranks, options_of(self))
        return self.end_to_end.train(inputs.calibration, result, key)
