"""What a sweep comes to: its curve, the verdict, what a token costs, what else would do. Pure.

Money and advice are of hardware that is known by name: where no GPU was seen, or a simulated one,
the verdict stays what the judge said, and no price is made up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from agent.model import Curve, Level, Sweep, UsageError
from agent.sizing import money
from agent.sizing.curve import analyse
from agent.sizing.judge import judge
from agent.sizing.money import ALL, Prices, Share

if TYPE_CHECKING:
    from agent.sizing.hardware import Gpu


def conclude(
    sweep: Sweep,
    *,
    expect_concurrency: float | None = None,
    expect_rps: float | None = None,
    prices: Prices | None = None,
) -> Sweep:
    """The sweep with its curve and verdict; with costs where its GPUs are known.

    `prices`: else the catalogue's.
    """
    curve = analyse(sweep.levels, sweep.slo) if sweep.levels else Curve()
    verdict = judge(
        sweep.levels,
        curve,
        sweep.slo,
        expect_concurrency=expect_concurrency,
        expect_rps=expect_rps,
        simulated=sweep.run.simulated,
        target=sweep.target.url,
        endpoint=sweep.workload.endpoint,
    )
    judged = msgspec.structs.replace(sweep, curve=curve, verdict=verdict)
    card = _card(sweep)
    return judged if card is None else _valued(judged, card, prices or money.catalogue())


def _card(sweep: Sweep) -> Gpu | None:
    """The device that was measured; null where none was seen, or none that is known."""
    from agent.sizing.candidates import card_of

    if sweep.run.simulated or not sweep.target.gpus:
        return None
    try:
        return card_of(sweep.target)
    except UsageError:
        return None


def _valued(sweep: Sweep, card: Gpu, prices: Prices) -> Sweep:
    from agent.sizing.advice import advise
    from agent.sizing.kind import Known

    levels = [_priced(level, sweep, card, prices) for level in sweep.levels]
    priced = msgspec.structs.replace(sweep, levels=levels)
    assert sweep.verdict is not None
    known = Known(
        levels,
        tuple(sweep.slo),
        priced,
        settings={key.rpartition(".")[2]: text for key, text in sweep.target.settings.items()},
        prices=prices,
        target=sweep.target.url,
    )
    return msgspec.structs.replace(priced, verdict=advise(sweep.verdict, known))


def _priced(level: Level, sweep: Sweep, card: Gpu, prices: Prices) -> Level:
    """USD per million output tokens that met the SLO, at the typical price; null where it is not
    known, or none met it. Without an SLO all tokens count."""
    watts = [view.power_w_mean for view in level.gpu]
    known = [one for one in watts if one is not None]
    whole = sum(known) if known and len(known) == len(watts) else None
    an_hour = money.hourly(card, len(sweep.target.gpus), prices, whole)
    met = level.slo_attainment
    share = ALL if not sweep.slo else None if met is None else Share(met, met, met)
    if an_hour is None or share is None or not level.output_tokens_per_s:
        return level
    usd = money.per_million(an_hour, level.output_tokens_per_s, share)
    return msgspec.structs.replace(
        level, cost_usd_per_million_output_tokens=usd.typical if usd else None
    )
