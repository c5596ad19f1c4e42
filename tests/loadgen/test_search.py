"""Which load next: the planted capacity lies in the stated interval, within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from agent.model import Level, Measurement, Requests, Slo, SloCapacity, Stats
from agent.sizing.curve import analyse
from agent.stats import summary
from loadgen import search
from loadgen.search import Done, Sample, Settings, Step, next_step, standing

BOUND_MS = 500.0
MEAN = (Slo("ttft", "mean", BOUND_MS),)
P95 = (Slo("ttft", "p95", BOUND_MS),)


class Server(msgspec.Struct, frozen=True):
    """A server whose TTFT grows with the load and whose throughput stops growing."""

    capacity: float  # the load at which TTFT is the bound
    knee: float = 16.0
    power: float = 1.0  # how steeply TTFT grows
    idle_ms: float = 20.0
    e2e_idle_s: float = 0.5

    def ttft_ms(self, load: float) -> float:
        return self.idle_ms + (BOUND_MS - self.idle_ms) * (load / self.capacity) ** self.power

    def tokens_per_s(self, load: float) -> float:
        return 1000 * self.knee * (1 - math.exp(-load / self.knee))

    def e2e_s(self, load: float) -> float:
        return self.e2e_idle_s * load / self.knee / (1 - math.exp(-load / self.knee))

    def level(self, load: float, mode: str, ttft: Stats, *, valid: bool = True) -> Level:
        tokens = self.tokens_per_s(load)
        return Level(
            mode="rate" if mode == "rate" else "concurrency",
            concurrency=int(load) if mode == "concurrency" else None,
            offered_rps=load if mode == "rate" else None,
            output_tokens_per_s=tokens,
            output_tokens_per_s_ci95=(tokens * 0.99, tokens * 1.01),
            request_throughput=load if mode == "rate" else tokens / 100,
            requests=Requests(ttft.n, 0, 0, {}),
            ttft_ms=ttft,
            e2e_ms=Stats(mean=1e3 * self.e2e_s(load), n=ttft.n),
            measurement=Measurement(
                valid, [] if valid else ["client_limited: loop_lag_p99_ms 40"], in_flight_mean=load
            ),
        )


Measure = Callable[[float, int], Level]


def searched(
    settings: Settings, measure: Measure, overhead_s: float = 0.3
) -> tuple[list[Level], list[Step], str, float]:
    """Levels, steps, why it ended and how long it took; every level runs to its limit."""
    levels: list[Level] = []
    steps: list[Step] = []
    elapsed_s = 1.0
    while isinstance(step := next_step(levels, settings, elapsed_s), Step):
        assert len(steps) < search.LEVELS_MAX
        assert step.load > 0
        assert step.duration_s > 0
        steps.append(step)
        levels.append(measure(step.load, len(levels)))
        elapsed_s += step.duration_s + (levels[-1].e2e_ms.mean or 0.0) / 1e3 + overhead_s
    return levels, steps, step.why, elapsed_s


def capacity(levels: Sequence[Level], slo: Sequence[Slo]) -> SloCapacity:
    found = analyse(levels, slo).slo_capacity
    assert found is not None
    return found


def exact(server: Server, mode: str = "concurrency") -> Measure:
    return lambda load, _: server.level(load, mode, Stats(mean=server.ttft_ms(load), n=400))


servers = st.builds(
    lambda capacity, saturation, power: Server(capacity, capacity / saturation, power),
    st.floats(1.01, 1000),
    st.floats(0.1, 20),  # how far beyond the bend of the throughput the SLO breaks
    st.floats(0.5, 8),
)
many = given_settings(max_examples=40)
LONG = 1e6


@many
@given(servers)
def test_the_planted_capacity_lies_between_two_whole_numbers(server: Server) -> None:
    settings = Settings("concurrency", LONG, MEAN)
    levels, steps, why, _ = searched(settings, exact(server))
    found = capacity(levels, MEAN)
    assert found.lo is not None
    assert found.hi is not None
    assert found.lo < server.capacity <= found.hi
    assert found.hi - found.lo <= 1 or found.hi <= search.TIGHT * found.lo
    assert found.bracketed
    assert why.endswith("tight")
    assert len(steps) <= 2 * math.log2(server.capacity) + 8
    # Whole numbers, and after the growth each strictly inside what was known before.
    assert all(step.load == int(step.load) for step in steps)
    for at, step in enumerate(steps):
        before = analyse(levels[:at], MEAN).slo_capacity
        tested = {float(level.concurrency or 0) for level in levels[:at]}
        if before and before.lo and before.hi and step.load not in tested:
            assert before.lo < step.load < before.hi


@many
@given(servers, st.floats(0.02, 50))
def test_a_rate_is_bracketed_within_ten_percent(server: Server, start: float) -> None:
    settings = Settings("rate", LONG, MEAN, start=start)
    levels, _, why, _ = searched(settings, exact(server, "rate"))
    found = capacity(levels, MEAN)
    if found.lo is None:  # even a small share of where it began is too much
        assert "least that is tried" in why
        return
    assert found.hi is not None
    assert found.lo < server.capacity <= found.hi
    assert found.hi <= 1.101 * found.lo


@many
@given(servers, st.floats(0.001, 0.3), st.randoms(use_true_random=False))
def test_noise_within_what_the_levels_state_never_shuts_the_truth_out(
    server: Server, noise: float, random: Random
) -> None:
    def measure(load: float, _: int) -> Level:
        true = server.ttft_ms(load)
        half = noise * true
        seen = true + random.uniform(-0.5, 0.5) * half
        return server.level(
            load, "concurrency", Stats(mean=seen, std=half * math.sqrt(100) / 1.96, n=100)
        )

    levels, steps, _, _ = searched(Settings("concurrency", LONG, MEAN), measure)
    found = capacity(levels, MEAN)
    assert (found.lo or 0.0) < server.capacity <= (found.hi or math.inf)
    assert found.hi is not None
    assert len(steps) < search.LEVELS_MAX


def test_the_stated_interval_of_a_p95_holds_what_95_of_100_searches_should() -> None:
    """Samples of requests, as a real level has them, and not the distribution itself."""
    inside, width = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        server = Server(capacity=float(rng.uniform(2, 60)), power=float(rng.uniform(1, 3)))

        def measure(load: float, _: int, s: Server = server, g: np.random.Generator = rng) -> Level:
            spread = 0.15
            p95 = math.exp(1.645 * spread)  # of a lognormal with median 1
            sample = s.ttft_ms(load) / p95 * np.exp(spread * g.standard_normal(120))
            return s.level(load, "concurrency", summary(sample))

        levels, _, _, _ = searched(Settings("concurrency", LONG, P95), measure)
        found = capacity(levels, P95)
        assert found.hi is not None
        inside += (found.lo or 0.0) < server.capacity <= found.hi
        width.append((found.hi - (found.lo or 0.0)) / server.capacity)
    assert inside >= 57
    assert float(np.median(width)) < 0.3


# ------------------------------------------------------------------------------------ the budget


@many
@given(servers, st.floats(5, 600), st.floats(0.05, 20))
def test_the_budget_is_kept_but_for_a_drain(server: Server, budget_s: float, e2e_s: float) -> None:
    server = msgspec.structs.replace(server, e2e_idle_s=e2e_s)
    settings = Settings("concurrency", budget_s, MEAN)
    levels, steps, why, took_s = searched(settings, exact(server))
    drain_s = (levels[-1].e2e_ms.mean or 0.0) / 1e3
    assert took_s <= budget_s + drain_s + 0.31
    assert steps[0].duration_s <= 0.11 * budget_s
    assert "budget" in why or "tight" in why or "least" in why


def test_where_levels_are_long_it_grows_in_larger_steps() -> None:
    slow = Server(capacity=100, e2e_idle_s=4.0)
    _, hurried, _, _ = searched(Settings("concurrency", 300, MEAN), exact(slow))
    _, calm, _, _ = searched(Settings("concurrency", 3000, MEAN), exact(slow))
    assert [step.load for step in hurried[:4]] == [1, 4, 16, 64]
    assert [step.load for step in calm[:4]] == [1, 2, 4, 8]


@many
@given(servers, st.sampled_from(["concurrency", "rate"]), st.integers(0, 40))
def test_a_resumed_search_takes_the_same_decisions(server: Server, mode: str, cut: int) -> None:
    settings = Settings("rate" if mode == "rate" else "concurrency", LONG, MEAN)
    levels, steps, _, _ = searched(settings, exact(server, mode))
    at = min(cut, len(steps) - 1)
    assert next_step(levels[:at], settings, 0.0) == next_step(levels[:at], settings, 50.0)
    again = next_step(levels[:at], settings, 1.0)
    assert isinstance(again, Step)
    assert again.load == steps[at].load


# --------------------------------------------------------------------------------- other endings


def test_without_an_slo_the_knee_is_found() -> None:
    server = Server(capacity=math.inf, knee=20)
    levels, _, why, _ = searched(Settings("concurrency", LONG), exact(server))
    found = analyse(levels).knee
    assert found is not None
    # 95 % of the best: 1 - e^-x = 0.95 at x = 3.
    assert found.concurrency == pytest.approx(60, rel=0.25)
    assert why.startswith("throughput stopped growing")
    assert len(levels) <= 14


def test_one_stream_alone_that_breaks_the_slo_is_said() -> None:
    levels, _, why, _ = searched(Settings("concurrency", LONG, MEAN), exact(Server(capacity=0.5)))
    assert [level.concurrency for level in levels] == [1, 1]
    assert why == "the SLO breaks at 1, the least that is tried"


def test_a_target_that_never_gets_nearer_ends_the_growth() -> None:
    """An ITL under an admission cap stays what it is, however many wait."""
    server = Server(capacity=math.inf, knee=8)
    levels, _, why, _ = searched(Settings("concurrency", LONG, MEAN), exact(server))
    assert "no target of the SLO gets nearer" in why
    assert capacity(levels, MEAN).bracketed is False
    assert max(level.concurrency or 0 for level in levels) <= 512


def test_the_declared_demand_is_tried_where_the_answer_may_lie() -> None:
    settings = Settings("concurrency", LONG, MEAN, expect=24)
    levels, steps, _, _ = searched(settings, exact(Server(capacity=28)))
    assert 24 in [step.load for step in steps]
    assert capacity(levels, MEAN).lo == 27


def test_the_most_is_not_passed() -> None:
    settings = Settings("concurrency", LONG, MEAN, most=50)
    levels, _, why, _ = searched(settings, exact(Server(capacity=500, knee=400)))
    assert max(level.concurrency or 0 for level in levels) == 50
    assert "50 is the most that is tried" in why


# -------------------------------------------------------------------------------- invalid levels


def failing(server: Server, broken: Callable[[float, int], bool]) -> Measure:
    def measure(load: float, number: int) -> Level:
        ttft = Stats(mean=server.ttft_ms(load), n=400)
        return server.level(load, "concurrency", ttft, valid=not broken(load, number))

    return measure


def test_an_invalid_level_is_tried_once_more() -> None:
    levels, steps, _, _ = searched(
        Settings("concurrency", LONG, MEAN), failing(Server(20), lambda _, number: number == 2)
    )
    assert [step.load for step in steps[:5]] == [1, 2, 4, 4, 8]
    assert steps[3].why.startswith("once more: it was invalid (client_limited")
    assert capacity(levels, MEAN).lo == 19


def test_a_load_that_stays_invalid_is_passed() -> None:
    levels, steps, why, _ = searched(
        Settings("concurrency", LONG, MEAN), failing(Server(20), lambda load, _: load == 8)
    )
    loads = [step.load for step in steps]
    assert loads.count(8) == 2
    assert loads[loads.index(8) + 2] == 16
    assert any("8, which could not be measured" in step.why for step in steps)
    assert capacity(levels, MEAN).lo == 19
    assert "tight" in why


@many
@given(st.sets(st.integers(1, 64), max_size=20), st.floats(1.5, 60))
def test_whatever_is_invalid_it_ends_and_what_it_says_holds(bad: set[int], at: float) -> None:
    server = Server(capacity=at)
    levels, _, why, _ = searched(
        Settings("concurrency", LONG, MEAN), failing(server, lambda load, _: int(load) in bad)
    )
    found = analyse(levels, MEAN).slo_capacity
    assert why
    if found is not None:
        assert (found.lo or 0.0) < at <= (found.hi or math.inf)


def test_above_what_the_client_can_nothing_is_claimed() -> None:
    levels, _, why, _ = searched(
        Settings("concurrency", LONG, MEAN), failing(Server(500, 400), lambda load, _: load > 50)
    )
    found = capacity(levels, MEAN)
    assert (found.lo, found.hi, found.bracketed) == (45, None, False)
    assert "nothing above 45 can be measured (client_limited" in why


def test_no_valid_level_at_all_is_said() -> None:
    levels, _, why, _ = searched(
        Settings("concurrency", LONG, MEAN), failing(Server(20), lambda *_: True)
    )
    assert [level.concurrency for level in levels] == [1, 1, 2, 2]
    assert why.endswith("no valid level")


# ----------------------------------------------------------------------- when a level said enough


def series(
    rate: Callable[[float], float], seconds: float, *, in_flight: int = 8, e2e_s: float = 0.5
) -> list[Sample]:
    """Counts each half second of a level that gives `rate` tokens/s."""
    samples, tokens = [], 0.0
    for i in range(int(2 * seconds) + 1):
        at = i / 2
        samples.append(Sample(at, round(tokens), int(in_flight * at / e2e_s), in_flight))
        tokens += rate(at) / 2
    return samples


def test_where_nothing_is_generated_requests_are_steady_or_not() -> None:
    embedded = [sample._replace(tokens=0) for sample in series(lambda _: 1000, 20)]
    told = standing(embedded, "concurrency", 20)
    assert (told.half, told.enough) == (pytest.approx(0, abs=0.01), True)
    jerky = [s._replace(tokens=0, ok=s.ok + 100 * (i // 10)) for i, s in enumerate(embedded)]
    assert not standing(jerky, "concurrency", 20).enough


def test_a_steady_level_has_said_enough_after_five_e2e_times() -> None:
    flat = series(lambda _: 1000, 20)
    assert not standing(flat[:5], "concurrency", 20).enough
    first = next(n for n in range(len(flat)) if standing(flat[:n], "concurrency", 20).enough)
    assert flat[first - 1].at_s == search.WINDOW_S_MIN
    slow = series(lambda _: 1000, 20, e2e_s=2.0)
    first = next(n for n in range(len(slow)) if standing(slow[:n], "concurrency", 20).enough)
    assert slow[first - 1].at_s == pytest.approx(5 * 2.0, abs=0.6)


def test_enough_requests_are_waited_for() -> None:
    flat = series(lambda _: 1000, 20, in_flight=1)
    first = next(n for n in range(len(flat)) if standing(flat[:n], "concurrency", 20).enough)
    assert flat[first - 1].ok >= 20
    assert not standing(flat, "concurrency", 100).enough


def test_a_level_that_drifts_or_is_noisy_goes_on() -> None:
    drifting = standing(series(lambda at: 500 + 50 * at, 10), "concurrency", 20)
    assert not drifting.enough
    rng = Random(1)
    noisy = standing(series(lambda _: 1000 * rng.uniform(0.2, 1.8), 10), "concurrency", 20)
    assert not noisy.enough
    assert noisy.half is not None
    assert noisy.half > 0.05


def test_a_wave_of_one_e2e_time_is_no_noise() -> None:
    """Streams in step get their tokens in bursts; batches of whole E2E times even them out."""
    waves = series(lambda at: 1000 * (1 + math.sin(math.pi * at)), 20, e2e_s=2.0)
    assert standing(waves, "concurrency", 20).enough


def test_an_open_loop_needs_requests_or_an_overload() -> None:
    flat = series(lambda _: 1000, 10)
    assert standing(flat, "rate", 100).enough
    assert not standing(flat, "rate", 200).enough
    growing = [
        Sample(i / 2, 500 * i, 10 * i, 4 + 20 * i) for i in range(21)
    ]  # 20 a second are done, more and more wait
    assert standing(growing, "rate", 100).enough


@many
@given(
    st.lists(
        st.tuples(st.floats(0, 2), st.integers(0, 1000), st.integers(0, 50), st.integers(0, 100)),
        max_size=40,
    )
)
def test_any_series_has_a_standing(steps: list[tuple[float, int, int, int]]) -> None:
    at, tokens, ok = 0.0, 0, 0
    samples = []
    for gap, more, done, in_flight in steps:
        at, tokens, ok = at + gap, tokens + more, ok + done
        samples.append(Sample(at, tokens, ok, in_flight))
    for mode in ("concurrency", "rate"):
        found = standing(samples, mode, 20)  # type: ignore[arg-type]
        assert found.half is None or found.half >= 0


def test_a_finished_search_says_why() -> None:
    assert isinstance(next_step([], Settings("concurrency", 10.0), 0.0), Step)
    levels = [Server(20).level(1, "concurrency", Stats(mean=30, n=100))]
    ended = next_step(levels, Settings("concurrency", 10.0, MEAN), 9.9)
    assert isinstance(ended, Done)
    assert ended.why == "the budget of 10 s is spent: the SLO holds at 1, and was not broken"
