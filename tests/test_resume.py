"""Nothing is computed twice: not by another run, nor by the same one after it was interrupted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, divided
from test_execution import metrics, overrides, run, source  # noqa: F401 (a fixture)

import iosvd.cache.code
import iosvd.cache.keys
import iosvd.cache.spectra
import iosvd.cache.statistics
import iosvd.runs.evaluation
import iosvd.runs.execution
import iosvd.runs.measurement
import iosvd.trials
from iosvd.allocation import Allocation, LossAware, SensitivitySearch, Spectral
from iosvd.cache.code import code_digest, source_files
from iosvd.cache.disk import Cache
from iosvd.cache.keys import CacheKeys, SpectrumKeys
from iosvd.cache.store import Store
from iosvd.errors import ConfigError
from iosvd.factorization import Factorization
from iosvd.method import Method
from iosvd.pipeline import Compressed, compress, factorize
from iosvd.runs.execution import Outcome, execute, with_half_the_batch
from iosvd.runs.records import run_folder
from iosvd.runs.steps import cache_of
from iosvd.statistics.memory import MemoryUse
from iosvd.whitening import Input, InputOutput, Whitening
from iosvd.windows import Windows

TOKENS = torch.randint(0, 31, (8, 12), generator=torch.Generator().manual_seed(1))
ROOT = Path(__file__).parents[1]


class Counter:
    """Counts the calls of functions of a module, and may fail at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.calls = monkeypatch, dict[str, list[Any]]()

    def watch(self, module: Any, name: str, fail_at: int = 0, error: type = KeyError) -> None:
        original: Callable[..., Any] = getattr(module, name)
        calls = self.calls.setdefault(name, [])

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) == fail_at:
                raise error("as if the process had been killed")
            return original(*args, **options)

        self.monkeypatch.setattr(module, name, counted)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def compressed(
    store: Store,
    whitening: Whitening = InputOutput(),  # noqa: B008 (frozen)
    allocation: Allocation = LossAware(),  # noqa: B008 (frozen)
    ratio: float = 0.6,
    **options: Any,
) -> Compressed:
    return compress(
        build("llama"),
        TOKENS,
        ratio=ratio,
        store=store,
        identity="llama",
        **divided({"whitening": whitening, "allocation": allocation, **options}),
    )


def equal(one: Compressed, other: Compressed) -> bool:
    parameters = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return one.plan == other.plan and all(torch.equal(a, b) for a, b in parameters)


def test_what_is_computed_once_serves_every_ratio_and_allocation(
    tmp_path: Path, counter: Counter
) -> None:
    counter.watch(iosvd.cache.statistics, "collect")
    cache = Cache(tmp_path)
    for ratio in (0.8, 0.5):
        for allocation in (LossAware(), Spectral()):
            compressed(cache, allocation=allocation, ratio=ratio)
    assert len(counter.calls["collect"]) == 1
    compressed(cache, Input(), Spectral())  # Its metric is among those that IO-SVD needed.
    assert len(counter.calls["collect"]) == 1
    compressed(cache, InputOutput(top_k=3), Spectral())
    assert len(counter.calls["collect"]) == 2
    (_, _, _, needs, *_) = counter.calls["collect"][1]
    assert needs.kl_metric.top_k == 3 and not needs.input_metric


@pytest.mark.parametrize("quantization", ["none", "plus"])
def test_from_the_cache_comes_the_same_as_without(quantization: str, tmp_path: Path) -> None:
    """To the bit between first and later runs, whoever computed what."""
    from iosvd.quantization import LossAwareRemap, NoQuantization

    options = {"quantization": LossAwareRemap() if quantization == "plus" else NoQuantization()}
    cache = Cache(tmp_path / "a")
    first = compressed(cache, **options)
    assert equal(compressed(cache, **options), first)
    other = Cache(tmp_path / "b")
    compressed(other, Input(), Spectral(), memory=MemoryUse(limit_bytes=2000))
    assert equal(compressed(other, **options), first)
    from iosvd.cache.store import NoStore

    alone = compressed(NoStore(), **options)
    assert alone.plan.ranks == first.plan.ranks
    for one, same in zip(alone.model.parameters(), first.model.parameters(), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-5)


def test_an_interrupted_factorisation_goes_on_at_the_site_where_it_was(
    tmp_path: Path, counter: Counter
) -> None:
    cache = Cache(tmp_path)
    counter.watch(iosvd.cache.statistics, "collect")
    factorised: list[str] = []
    original = Factorization.__call__

    def watched(self: Factorization, weight: Any, whitener: Any, site: str) -> Any:
        factorised.append(site)
        if len(factorised) == 6:
            raise KeyError(site)
        return original(self, weight, whitener, site)

    counter.monkeypatch.setattr(Factorization, "__call__", watched)
    with pytest.raises(KeyError):
        compressed(cache)
    compressed(cache)
    assert len(counter.calls["collect"]) == 1
    assert len(factorised) == 14 + 1 and factorised[5] == factorised[6]


def test_statistics_that_were_collected_in_part_are_completed(
    tmp_path: Path, counter: Counter
) -> None:
    """As where an entry was evicted or damaged: only that one is collected again."""
    cache = Cache(tmp_path)
    whole = compressed(cache, allocation=Spectral())
    for kept in cache.entries():
        if kept.kind == "spectra":
            cache.discard(kept)
    (victim, *_) = [kept for kept in cache.entries() if kept.kind == "statistics"]
    identity = json.loads((victim.path / "header.json").read_text())["identity"]
    cache.discard(victim)
    counter.watch(iosvd.cache.statistics, "collect")
    assert equal(compressed(cache, allocation=Spectral()), whole)
    ((_, _, sites, needs, *_),) = counter.calls["collect"]
    assert list(sites) == [identity["site"]]
    assert set(needs.parts()) == {"input_metric", "kl_metric"} & set(identity)


def test_measured_trials_serve_every_ratio(tmp_path: Path, counter: Counter) -> None:
    counter.watch(iosvd.trials, "mean_loss")
    search, cache = SensitivitySearch(), Cache(tmp_path)
    first = compressed(cache, Input(), search, 0.8)
    trials = len(counter.calls["mean_loss"])
    assert 14 < trials <= 9 * 14  # Some ratios are the same rank here.
    again = compressed(cache, Input(), search, 0.5)
    assert len(counter.calls["mean_loss"]) == trials
    # The seconds of the table are those of the whole method, whoever paid for them.
    headers = [json.loads(path.read_text()) for path in tmp_path.glob("trials/*/header.json")]
    paid = sum(header["cost"]["seconds"] for header in headers)
    assert len(headers) == trials and 0 < paid <= again.stages["allocation"].seconds
    assert equal(compressed(cache, Input(), search, 0.8), first)


def test_changed_code_or_another_model_makes_other_entries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def digests() -> set[str]:
        keys = CacheKeys.of("llama", Windows(TOKENS), None)
        needs = InputOutput().needs
        parts = [keys.statistic(name, part, "a") for name, part in needs.parts().items()]
        spectrum = SpectrumKeys(keys, InputOutput(), Factorization()).spectrum("a")
        return {key.digest for key in (*parts, spectrum)}

    before = digests()
    code_digest.cache_clear()
    for file in ("accumulators.py", "collect.py", "grams.py", "needs.py"):
        package = tmp_path / file
        package.mkdir()
        for path in (ROOT / "iosvd").rglob("*.py"):
            copy = package / path.relative_to(ROOT / "iosvd")
            copy.parent.mkdir(exist_ok=True, parents=True)
            copy.write_text(path.read_text() + ("\n# changed" if path.name == file else ""))
        monkeypatch.setattr(iosvd.cache.code, "_ROOT", package)
        code_digest.cache_clear()
        assert not before & digests()
    (package / "statistics" / "collect.py").unlink()
    code_digest.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"iosvd\.statistics\.collect, which does not"):
        digests()
    monkeypatch.undo()
    code_digest.cache_clear()
    assert digests() == before


def test_a_value_depends_on_all_that_its_module_imports() -> None:
    """The imports as Python carries them out, in a process of its own."""
    script = "import sys, importlib; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    for name in ("iosvd.factorization", "iosvd.data.texts"):
        there = subprocess.run(
            [sys.executable, "-c", f"import iosvd\n{script}", name],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout.split()
        files = {path.relative_to(ROOT).with_suffix("") for path in source_files([name])}
        named = {".".join(path.parts).removesuffix(".__init__") for path in files}
        assert name in named and named <= set(there)


def test_a_whitening_of_ones_own_is_known_by_its_source(tmp_path: Path) -> None:
    def digest_of(name: str, text: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(f"class Mine:\n    {text}\n")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            return code_digest("spectra", module.Mine)
        finally:
            del sys.modules[name]

    one = digest_of("mine_a", "x = 1")
    assert one == digest_of("mine_b", "x = 1") != digest_of("mine_c", "x = 2")
    without = (type("Mine", (), {"__module__": "gone"}) for _ in range(2))
    assert len({code_digest("spectra", kind) for kind in without}) == 2  # Never taken for another.


def test_a_text_that_was_measured_is_not_measured_again(
    source: Path,  # noqa: F811
    counter: Counter,
) -> None:
    asked = run(source, "ratio=0.5", "eval=paper", *paper_texts(source))
    counter.watch(iosvd.runs.evaluation, "perplexity", fail_at=2)
    assert execute(asked) is Outcome.failed
    counter.watch(iosvd.cache.statistics, "collect")
    assert execute(asked) is Outcome.complete
    assert len(counter.calls["perplexity"]) == 4  # One, the failure, and the two that were missing.
    assert counter.calls["collect"] == []
    found = metrics(run_folder(asked))
    assert set(found["perplexity"]) == {"wikitext2", "ptb", "c4"}  # type: ignore[call-overload]
    assert found["computed_here"] == []
    place = f"runtime.results={source}/b"
    alone = run(source, "ratio=0.5", "eval=paper", *paper_texts(source), place)
    assert execute(alone) is Outcome.complete
    again = metrics(run_folder(alone))
    for name in ("perplexity", "predicted_kl", "bits_kept", "target_bytes"):
        assert found[name] == again[name]
    assert not list(run_folder(asked).glob("parts.json"))


def paper_texts(source: Path) -> list[str]:  # noqa: F811
    lines = (source / "text" / "train.txt").read_text()
    for name in ("wikitext2", "ptb", "c4"):
        folder = source / name
        folder.mkdir(exist_ok=True)
        (folder / "test.txt").write_text(name + lines)
        (folder / "validation.jsonl").write_text(json.dumps({"text": name + lines}) + "\n")
    places = [f"eval.texts.{name}.path={source}/{name}" for name in ("wikitext2", "ptb", "c4")]
    return [*places, "eval.zero_shot.tasks=[]", "eval.windows=4"]


def test_parts_of_another_protocol_or_damaged_ones_are_measured_again(
    source: Path,  # noqa: F811
    counter: Counter,
) -> None:
    asked = run(source, "ratio=0.5", "eval=paper", *paper_texts(source))
    counter.watch(iosvd.runs.evaluation, "perplexity", fail_at=3)
    assert execute(asked) is Outcome.failed
    parts = run_folder(asked) / "parts.json"
    parts.write_text(parts.read_text().replace("wikitext2", "wikitext3", 1))
    assert execute(asked) is Outcome.complete
    assert len(counter.calls["perplexity"]) == 6


def test_a_run_that_is_carried_out_elsewhere_is_left_to_it(source: Path) -> None:  # noqa: F811
    from iosvd.runs.execution import locked

    asked = run(source, "method=svd", "ratio=0.5")
    with locked(asked):
        assert execute(asked) is Outcome.elsewhere
    assert not run_folder(asked).exists()
    assert execute(asked) is Outcome.complete


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError, MemoryError, RuntimeError], ids=lambda e: e.__name__
)
def test_out_of_memory_is_tried_once_more_with_half_the_batch(
    error: type,
    source: Path,  # noqa: F811
    counter: Counter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Raised(error):  # type: ignore[misc]
        def __str__(self) -> str:
            return "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"

    asked = run(source, "ratio=0.5", "runtime.batch_tokens=64")
    counter.watch(iosvd.cache.statistics, "collect", fail_at=1, error=Raised)
    assert execute(asked) is Outcome.complete
    sizes = [args[4] for args in counter.calls["collect"]]
    assert sizes == [4, 2]
    found = metrics(run_folder(asked))["out_of_memory"]
    assert found["batch_tokens"] == 32 and "allocate" in found["error"]  # type: ignore[call-overload,index]
    assert "out of memory; tried once more with batches of 32 tokens" in caplog.text
    calls = []

    def never(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise Raised

    counter.monkeypatch.setattr(iosvd.cache.statistics, "collect", never)
    twice = run(source, "ratio=0.5", "whitening.top_k=2")
    assert execute(twice) is Outcome.failed
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("device", "options", "moves"),
    [
        ("cuda", [], True),
        ("cpu", [], False),  # They are there already.
        ("cuda", ["method=io_svd_anchored"], False),
        ("cuda", ["runtime.device_map=auto"], False),
        ("cuda", ["runtime.batch_tokens=64"], False),  # Four windows: half of them are tried.
    ],
)
def test_a_single_window_that_does_not_fit_moves_blocks_to_main_memory(
    device: str,
    options: list[str],
    moves: bool,
    source: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(iosvd.runs.execution, "device_for", lambda _: device)
    smaller = with_half_the_batch(run(source, "runtime.batch_tokens=16", *options))
    assert smaller.runtime.resources.blocks_on_cpu is moves


def test_other_errors_are_not_tried_again(source: Path, counter: Counter) -> None:  # noqa: F811
    counter.watch(iosvd.cache.statistics, "collect", fail_at=1, error=RuntimeError)
    assert execute(run(source, "ratio=0.5")) is Outcome.failed
    assert len(counter.calls["collect"]) == 1


def test_the_same_run_in_two_processes_has_the_same_plan_to_the_bit(
    source: Path,  # noqa: F811
) -> None:
    plans = []
    for place in ("one", "two"):
        asked = overrides(source, "ratio=0.5", f"runtime.results={source}/{place}")
        command = [sys.executable, "experiments/compress.py", *asked]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
        plans.append(next((source / place).rglob("plan.json")).read_bytes())
    assert plans[0] == plans[1]


def test_tokens_are_read_again_where_anything_about_them_changed(
    source: Path,  # noqa: F811
    counter: Counter,
) -> None:
    import iosvd.runs.tokens

    counter.watch(iosvd.runs.tokens, "calibration_windows")
    counter.watch(iosvd.runs.tokens, "evaluation_windows")

    def counts(*more: str) -> tuple[int, int]:
        assert execute(run(source, "method=svd", *more)) is Outcome.complete
        return len(counter.calls["calibration_windows"]), len(counter.calls["evaluation_windows"])

    assert counts() == (1, 1)
    assert counts("ratio=0.3") == (1, 1)
    assert counts("calibration.seed=1") == (2, 1)
    assert counts("calibration.windows=4") == (3, 1)
    assert counts("eval.windows=2") == (3, 2)
    text = source / "text" / "validation.txt"
    text.write_text(text.read_text() + "One more line.\n")
    assert counts() == (3, 3)
    kinds = [kept.kind for kept in cache_of(run(source)).entries()]
    assert kinds.count("tokens") == 6


def test_the_seconds_of_shared_stages_are_those_of_who_paid(source: Path) -> None:  # noqa: F811
    runs = [run(source, f"ratio={ratio}") for ratio in (0.8, 0.5)]
    for asked in runs:
        assert execute(asked) is Outcome.complete
    first, second = (metrics(run_folder(asked)) for asked in runs)
    assert first["computed_here"] == ["factorization", "statistics"]
    assert second["computed_here"] == []
    for stage in ("statistics", "factorization"):
        assert first["stages"][stage] == second["stages"][stage]  # type: ignore[index]
        assert first["stages"][stage]["seconds"] > 0  # type: ignore[index]


def test_spectra_need_no_memory_of_their_own(tmp_path: Path) -> None:
    """They are mapped from their files: of a spectrum that nobody looks at nothing is loaded."""
    script = """
import sys, torch
from pathlib import Path
from iosvd.cache.disk import Cache
from iosvd.system.machine import resident_bytes
from iosvd.system.timing import Stage
from iosvd.cache.store import Entry, Key
cache, keys = Cache(Path(sys.argv[1])), [Key("spectra", {"n": n}) for n in range(20)]
for key in keys:
    cache.put(key, Entry({"left": torch.rand(1000, 1000)}, Stage(0, 0)))
before = resident_bytes()
kept = [cache.get(key) for key in keys]
print((resident_bytes() - before) / 4e6)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert float(found.stdout) < 4  # Of twenty; one is hashed at a time.


def test_factorize_keeps_what_a_store_is_for(tmp_path: Path) -> None:
    options = {"method": Method(InputOutput(), Spectral())}
    cut = factorize(build("llama"), TOKENS, **options)
    kept = {"store": Cache(tmp_path), "identity": "llama"}
    whole = factorize(build("llama"), TOKENS, **kept, **options)
    with pytest.raises(ConfigError, match="a store needs identity=…"):
        factorize(build("llama"), TOKENS, store=Cache(tmp_path), **options)
    for name, spectrum in whole.spectra.items():
        assert spectrum.left.shape[1] == len(spectrum.sigma) > cut.spectra[name].left.shape[1]


def test_a_large_model_is_hashed_once_on_a_machine(
    source: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    counter: Counter,
) -> None:
    import iosvd.runs.fingerprints as fingerprints

    monkeypatch.setattr(fingerprints, "_LARGE_BYTES", 10)
    counter.watch(fingerprints, "_hash_bytes")
    found = set()
    for _ in range(2):
        fingerprints._hash.cache_clear()  # As another process has it.
        found.add(fingerprints.digest(run(source)))
    models = [args for args in counter.calls["_hash_bytes"] if len(args[0]) > 1]
    assert len(models) == len(found) == 1
    path = source / "small" / "config.json"
    path.write_text(path.read_text() + " ")
    fingerprints._hash.cache_clear()
    assert fingerprints.digest(run(source)) not in found
    changed = fingerprints.digest(run(source))
    for damaged in (source / "results" / "cache" / "hashes").iterdir():
        damaged.write_text("{}")
    fingerprints._hash.cache_clear()
    assert fingerprints.digest(run(source)) == changed
