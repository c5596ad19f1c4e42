"""Which level next: the next of a list, or what the search says, within the budget."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from agent.model import Level
from loadgen import moment
from loadgen.config import CONCURRENCY_MAX, DEFAULT_BUDGET_S, Options
from loadgen.level import Plan
from loadgen.search import HALF_MAX, Done, Sample, Settings, Standing, Step, next_step, standing

if TYPE_CHECKING:
    from agent.trace import Trace

RATE_MAX = 100_000.0


class Upcoming(NamedTuple):
    """A level to be measured."""

    plan: Plan
    of: int | None  # how many there will be; None: nobody knows
    why: str = ""  # that one, where it was chosen
    left: str = ""  # of the whole run when it begins, where that is known


class End(NamedTuple):
    """There is no further level; `why` where that is worth a line."""

    why: str


class Schedule:
    """The levels of a run, one after the other. Its clock begins with it."""

    def __init__(self, options: Options, trace: Trace | None, spent_s: float = 0.0) -> None:
        """`spent_s`: of the budget, before a run was taken up again."""
        self.start_rps = 0.0  # of a search for a rate
        self._options = options
        self._trace = trace
        self._began_s = time.monotonic() - spent_s
        self._budget_s = options.budget_s or (DEFAULT_BUDGET_S if options.auto else math.inf)
        self._step: Step | None = None  # of a search, where it may end the level that is running

    @property
    def elapsed_s(self) -> float:
        """Time spent, without that between the end of a run and its being taken up again."""
        return time.monotonic() - self._began_s

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self._budget_s - self.elapsed_s

    def next(self, levels: Sequence[Level]) -> Upcoming | End:
        """What comes after these."""
        if self._options.auto is not None:
            return self._searched(levels)
        plans, number = self._options.plans(self._trace), len(levels)
        if number == len(plans):
            return End("")
        if self.left_s < _least_s(levels):
            return End(
                f"the budget of {self._budget_s:.0f} s is spent: the last {len(plans) - number} of "
                f"{len(plans)} levels were not measured"
            )
        repeats = self._options.repeats
        turn = number // (len(plans) // repeats) + 1
        why = f"repeat {turn} of {repeats}" if repeats > 1 else ""
        return Upcoming(plans[number], len(plans), why, self._estimate(plans[number:], levels))

    def _estimate(self, plans: Sequence[Plan], levels: Sequence[Level]) -> str:
        """How long these will take, by the levels before them; nothing where none tells."""
        later_s = moment.later_s(plans, levels)
        return "" if later_s is None else f"{moment.about(min(later_s, self.left_s))} left in all"

    def _searched(self, levels: Sequence[Level]) -> Upcoming | End:
        step = next_step(levels, self._settings(), self.elapsed_s)
        if isinstance(step, Done):
            return End(f"the search is at its end: {step.why}")
        options = self._options
        plan = options.plan_at(step.load)
        self._step = None
        if options.requests is None and options.duration_s is None:
            self._step = step
            opens = options.auto == "rate" and not plan.warmup_requests
            ramp_s = step.ramp_s if opens else 0.0
            plan = msgspec.structs.replace(
                plan,
                requests=None,
                duration_s=step.duration_s - (0.0 if plan.warmup_s else ramp_s),
                warmup_s=plan.warmup_s or ramp_s,
            )
        left = f"{self.left_s:.0f} s of {self._budget_s:.0f} s left"
        return Upcoming(plan, None, step.why, left)

    def _settings(self) -> Settings:
        options = self._options
        rate = options.auto == "rate"
        return Settings(
            mode="rate" if rate else "concurrency",
            budget_s=self._budget_s,
            slo=options.slo,
            start=self.start_rps if rate else 1.0,
            most=RATE_MAX if rate else float(options.requests or CONCURRENCY_MAX),
            expect=options.expect_rps if rate else options.expect_concurrency,
            level_s=options.duration_s,
            warmup_s=options.warmup_s,
        )

    def after(self, number: int) -> list[Plan] | None:
        """What comes after level `number`; None of a search, where nobody knows."""
        if self._options.auto is not None:
            return None
        return self._options.plans(self._trace)[number:]

    @property
    def half_wanted(self) -> float | None:
        """The relative half-width of tokens/s that ends the running level, where one does."""
        return HALF_MAX if self._step is not None and self._options.mode != "rate" else None

    def look(self, samples: Sequence[Sample]) -> Standing:
        """How the running level stands. Only one of a search can have said enough."""
        if self._step is None:
            return standing(samples, self._options.mode, 0)._replace(enough=False)
        return standing(samples, self._options.mode, self._step.requests_min)


def _least_s(levels: Sequence[Level]) -> float:
    """What the next level of a list takes at the least: a ramp, a window and a drain."""
    e2e_ms = levels[-1].e2e_ms.mean if levels else None
    return 4 * (e2e_ms or 0.0) / 1e3
