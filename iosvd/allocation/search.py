"""Black-box search for layers' ratios, by Optuna."""

from __future__ import annotations

from collections.abc import Callable

from iosvd.errors import extra
from iosvd.system.progress import track


def best_shares(
    loss: Callable[[list[float]], float],
    start: list[float],
    spread: float,
    trials: int,
    seed: int,
) -> list[float]:
    """Return the offsets with the least loss, each within ± spread.

    Args:
        loss: of offsets, one for each layer.
        start: the first to be tried; equal ratios are the second.
        spread: bound of the offsets.
        trials: how many are tried.
        seed: of the tree-structured Parzen estimator.
    """
    with extra("optuna"):
        import optuna  # Slow to import, and only this needs it.

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    names = [f"layer_{i}" for i in range(len(start))]
    for offsets in (start, [0.0] * len(start)):
        study.enqueue_trial(dict(zip(names, offsets, strict=True)))
    for _ in track(range(trials), trials, "search", "trial"):
        asked = study.ask()
        offsets = [asked.suggest_float(name, -spread, spread) for name in names]
        study.tell(asked, loss(offsets))
    return [study.best_params[name] for name in names]
