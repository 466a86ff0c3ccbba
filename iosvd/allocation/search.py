"""Black-box search for a few numbers with the least measured loss, by Optuna."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    names = [f"layer_{i}" for i in range(len(start))]
    return best_parameters(
        loss,
        dict.fromkeys(names, (-spread, spread)),
        trials,
        seed,
        [start, [0.0] * len(start)],
    )


def best_parameters(
    loss: Callable[[list[float]], float],
    ranges: Mapping[str, tuple[float, float]],
    trials: int,
    seed: int,
    first: Sequence[Sequence[float]] = (),
) -> list[float]:
    """Return the values with the least loss, in the order of their names.

    Args:
        loss: of one value for each name.
        ranges: the least and the greatest value of each name.
        trials: how many are tried.
        seed: of the tree-structured Parzen estimator.
        first: values that are tried before others.
    """
    with extra("optuna"):
        import optuna  # Slow to import, and only this needs it.

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for values in first:
        study.enqueue_trial(dict(zip(ranges, values, strict=True)))
    for _ in track(range(trials), trials, "search", "trial"):
        asked = study.ask()
        values = [asked.suggest_float(name, *ends) for name, ends in ranges.items()]
        study.tell(asked, loss(values))
    return [study.best_params[name] for name in ranges]
