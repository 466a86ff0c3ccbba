"""The KL curvature of the residual stream behind each decoder block (METHODS 11.5).

Like the output metric of a site (METHODS 2.2), with the cotangents that arrive at a block's
output: C_b = E[J_bᵀ H J_b], per token, so that ½ eᵀ C_b e predicts the KL divergence, in nats,
that an error e of the block's output causes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iosvd.errors import ModelError, NumericalError
from iosvd.grams import add_lower_gram_, flat, mirror_, wide
from iosvd.models.chain import without_graph
from iosvd.models.forward import activation_gradients
from iosvd.models.sites import decoder_blocks
from iosvd.statistics.kl_metric import KLMetric
from iosvd.statistics.needs import Needs
from iosvd.statistics.passes import body_of, check_logits, head_gradients
from iosvd.statistics.signals import Signals
from iosvd.system.progress import track
from iosvd.windows import Windows, as_windows

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


def block_curvatures(
    model: PreTrainedModel,
    tokens: Tensor | Windows,
    metric: KLMetric,
    batch_size: int,
    *,
    on_cpu: bool = False,
) -> list[Tensor]:
    """Return C_b (d, d) of every decoder block, in main memory.

    Cost: that of the KL metric of all sites, without their products.

    Args:
        model: a causal language model.
        tokens: calibration windows (windows, length), or those of images and text.
        metric: of the logits.
        batch_size: windows per forward pass.
        on_cpu: keep the sums in main memory, wherever the model is.

    Raises:
        ModelError: gradients cannot go back block by block.
        NumericalError: logits or gradients are not finite.
    """
    windows, sums = as_windows(tokens), dict[nn.Module, Tensor]()

    def see(block: nn.Module, gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:
            rows = flat(gradient)
            if block not in sums:
                place = "cpu" if on_cpu else rows.device
                square = 2 * rows.shape[1:]
                sums[block] = torch.zeros(square, dtype=wide(rows.dtype), device=place)
            add_lower_gram_(sums[block], rows)

    with activation_gradients(model):
        body = body_of(model, windows, [], backward=True)
        if not body.blocks:
            raise ModelError(
                f"gradients of {type(model).__name__} cannot go back block by block (or are not"
                " finite), so there is no curvature behind each; set"
                " correction.refinement.loss=squared"
            )
        starts = range(0, len(windows), batch_size)
        for start in track(starts, len(starts), "curvature of blocks", "batch"):
            signals = Signals(
                needs=Needs(kl_metric=metric),
                batch=windows[start : start + batch_size],
                first_window=start,
                vocabulary=model.config.get_text_config().vocab_size,
            )
            with without_graph(body.blocks) as chain:
                hidden = body(signals.batch)
            check = partial(check_logits, signals=signals)
            gradients = head_gradients(body.head, hidden.detach(), signals, check)
            chain.back(hidden, gradients, begin=lambda _: None, see=see)
    count = int(windows.positions.sum()) * metric.estimates
    return [_finished(sums[block], count, n) for n, block in enumerate(decoder_blocks(model))]


def _finished(total: Tensor, count: int, number: int) -> Tensor:
    mirror_(total)
    if not torch.isfinite(total).all():
        raise NumericalError(
            f"the gradients behind block {number} have NaN or infinity on the calibration set; try"
            " model.dtype=float32 or bfloat16"
        )
    return (total / count).cpu()
