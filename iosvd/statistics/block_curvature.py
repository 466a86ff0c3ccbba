"""The KL curvature of the residual stream behind each decoder block (METHODS 11.5).

Like the output metric of a site (METHODS 2.2), with the cotangents that arrive at a block's
output: C_b = E[J_bᵀ H J_b], per token, so that ½ eᵀ C_b e predicts the KL divergence, in nats,
that an error e of the block's output causes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from iosvd.errors import ModelError
from iosvd.grams import add_lower_gram_, flat, mirror_, wide
from iosvd.models.chain import without_graph
from iosvd.models.forward import activation_gradients
from iosvd.models.sites import decoder_blocks
from iosvd.statistics.kl_metric import KLMetric
from iosvd.statistics.needs import Needs
from iosvd.statistics.passes import body_of, check_logits, head_gradients
from iosvd.statistics.signals import Signals
from iosvd.system.progress import track

if TYPE_CHECKING:  # Importing transformers' models takes seconds.
    from transformers import PreTrainedModel


def block_curvatures(
    model: PreTrainedModel, tokens: Tensor, metric: KLMetric, batch_size: int
) -> list[Tensor]:
    """Return C_b (d, d) of every decoder block, in main memory.

    Cost: that of the KL metric of all sites, without their products.

    Args:
        model: a causal language model.
        tokens: calibration windows (windows, length).
        metric: of the logits.
        batch_size: windows per forward pass.

    Raises:
        ModelError: earlier blocks reach later ones by more than hidden states.
        NumericalError: logits are not finite.
    """
    sums: dict[nn.Module, Tensor] = {}

    def see(block: nn.Module, gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:
            rows = flat(gradient)
            if block not in sums:
                sums[block] = rows.new_zeros(2 * rows.shape[1:], dtype=wide(rows.dtype))
            add_lower_gram_(sums[block], rows)

    with activation_gradients(model):
        body = body_of(model, tokens, [], backward=True)
        if not body.blocks:
            raise ModelError(
                f"the blocks of {type(model).__name__} get more from each other than hidden states,"
                " so there is no curvature behind each; set correction.loss=squared"
            )
        starts = range(0, len(tokens), batch_size)
        for start in track(starts, len(starts), "curvature of blocks", "batch"):
            signals = Signals(
                needs=Needs(kl_metric=metric),
                batch=tokens[start : start + batch_size].to(model.device),
                first_window=start,
                vocabulary=model.config.get_text_config().vocab_size,
            )
            with without_graph(body.blocks) as chain:
                hidden = body(signals.batch)
            check = partial(check_logits, signals=signals)
            gradients = head_gradients(body.head, hidden.detach(), signals, check)
            chain.back(hidden, gradients, begin=lambda _: None, see=see)
    for total in sums.values():
        mirror_(total)
    count = tokens.numel() * metric.estimates
    return [(sums[block] / count).cpu() for block in decoder_blocks(model)]
