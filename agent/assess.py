"""What the agent concludes of a server or a service, from its store: demand and curve together.

The demand is what the window's minutes show. The curve is the newest stored one that fits the
server, else the one that production drew itself (`agent.sizing.passive`), else none. Pure modules
judge (`agent.sizing.judge`, `agent.sizing.production`); here they are given what they judge.

A service's replicas share its demand evenly here, as a balancer means them to: one server's curve
is held against its share. That takes replicas that are known to serve the same model; of others
a sweep of one says nothing of the rest, and the service is judged by what production showed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
import numpy as np

from agent.config import Config, read_prices
from agent.fitting import Fitting, address, fitting, model_of
from agent.minutes import MINUTE_S, Minute
from agent.model import Level, Reason, Slo, Sweep, Target, UsageError, Verdict
from agent.recall import Recall
from agent.samplers.dialects import SIMULATED
from agent.sizing import arrivals
from agent.sizing import curve as curves
from agent.sizing import scene as scenes
from agent.sizing.advice import advise
from agent.sizing.case import Observed, Unit
from agent.sizing.judge import judge
from agent.sizing.kind import Known
from agent.sizing.money import Prices, catalogue
from agent.sizing.passive import Passive, passive_curve
from agent.sizing.pattern import Pattern, pattern
from agent.sizing.production import conclude
from agent.sizing.rules import DEFAULTS, Thresholds
from agent.sizing.scene import USUAL, Needs, Scene, span
from agent.sizing.settle import Past, settled
from agent.sizing.trial import Trial, fitted, same_settings, throttled_levels, trial
from agent.sizing.window import COUNTERS, GAUGES, GPU, HISTOGRAMS, Window
from agent.when import utc

SERVICE = "service:"
LENGTHS_FACTOR = 1.25  # production's mean lengths further from the swept ones are others
UNEVEN_FACTOR = 1.5  # a replica busier than its share by more is not evenly balanced
STALE_S = 600.0  # samples older than this are said to be old
SERVER_SERIES = GAUGES | COUNTERS | frozenset(HISTOGRAMS)


class CurveUsed(msgspec.Struct, frozen=True):
    """Which curve a verdict rests on. `by`: what it was known by."""

    kind: Literal["measured", "passive", "none"]
    id: int | None = None
    by: Literal["server", "url", "model"] | None = None
    measured_at: str | None = None
    note: str = ""


class Assessment(msgspec.Struct, frozen=True):
    """A verdict, of whom and when, with the pattern and the curve that it was made from.

    `scope` is the server's name, or `service:` and the service's: so it is kept in the store.
    """

    scope: str
    at_unix_s: float
    verdict: Verdict
    pattern: Pattern
    curve: CurveUsed

    def as_json(self) -> dict[str, Any]:
        """The verdict's fields, and beside them what it is of."""
        return {
            **msgspec.to_builtins(self.verdict),
            "scope": self.scope,
            "at_unix_s": self.at_unix_s,
            "curve": msgspec.to_builtins(self.curve),
        }


def scope_of(server: str | None, service: str | None) -> str:
    """Under which name assessments of a server, or of a service, are kept."""
    return f"{SERVICE}{service}" if service is not None else str(server)


def assess(
    recall: Recall,
    *,
    server: str | None = None,
    service: str | None = None,
    window_s: float,
    slo: Sequence[Slo],
    expect_concurrency: float | None = None,
    trains: bool = False,
    open_minutes: Iterable[Minute] = (),
    now_s: float,
    urls: Mapping[str, str] | None = None,
    needs: Needs = USUAL,
    thresholds: Thresholds = DEFAULTS,
    prices: Prices | None = None,
) -> Assessment:
    """The verdict on a server, or on a service, from the window up to the newest sample.

    `slo`: the targets declared for it; without any those of the curve's sweep count, but nothing
    is then called over-sized. `open_minutes`: the unfinished ones, which the store does not hold.
    `urls`: of the servers, where they are known, to know a curve by. `needs` and `thresholds`: what
    the rules hang on, if not as usual. `prices`: else the catalogue's. Raises UsageError for an
    unknown server or service.
    """
    if (server is None) == (service is None):
        raise UsageError("an assessment is of one server or of one service: name it")
    owners = recall.servers(server, service)
    asked = _Asked(tuple(sorted(owners)), scope_of(server, service), now_s, urls or {})
    prints = {name: recall.fingerprints(name) for name in asked.servers}
    window, notes = _window(recall, asked, owners, window_s, open_minutes)
    seen = pattern(window)
    served = _served(recall, owners, prints)
    choice = _placed(_choose(recall, asked, owners, prints, window), served)
    targets = tuple(slo) or tuple(choice.sweep.slo if choice.sweep else ())
    replicas = len(owners) if choice.used.kind == "measured" else 1
    limits, doubts = _limits(choice, seen, window)
    past = _past(recall, asked, prints)
    if past and past[0].finding == "OVER_SIZED":
        needs = msgspec.structs.replace(needs, over_ratio_max=needs.over_exit)
    heat = scenes.heat(window)
    scene = Scene(
        pattern=seen,
        hours=scenes.hours(window, targets),
        slo=targets,
        declared_slo=bool(slo),
        curve=choice.used.kind,
        replicas=replicas,
        expect_concurrency=expect_concurrency,
        trains=trains,
        simulated=bool(choice.sweep and choice.sweep.run.simulated) or _is_simulated(prints),
        weekend_s=scenes.weekend_s(window),
        doubts=doubts,
        missing=(*choice.notes, *notes),
        rests_on=(_observed_line(window, seen), choice.used.note),
        target=_target(asked, choice),
        needs=needs,
        little=scenes.little(window),
        heat=heat,
        wrong=choice.wrong or _throttled(choice, heat, needs),
    )
    scene = _tried(scene, choice, window, limits, thresholds)
    verdict = conclude(scene, _judged(scene, choice, limits, thresholds))
    verdict = settled(verdict, past, needs, now_s)
    verdict = advise(verdict, _known(recall, asked, prints, scene, choice, prices, served))
    return Assessment(
        scope=asked.scope,
        at_unix_s=now_s,
        verdict=msgspec.structs.replace(verdict, since=_since(recall, asked, verdict.finding)),
        pattern=seen,
        curve=choice.used,
    )


def assess_each(
    recall: Recall,
    config: Config,
    *,
    server: str | None = None,
    service: str | None = None,
    window_s: float | None = None,
    slo: Sequence[Slo] | None = None,
    expect_concurrency: float | None = None,
    open_minutes: Sequence[Minute] = (),
    now_s: float,
) -> list[Assessment]:
    """The verdicts on what is named, or on each server and each service of several servers.

    What is not given here is as the configuration has it. Its expected concurrency is that of a
    service as a whole, so that it is not asked of each of its replicas. Raises UsageError for a
    name that is not known, and where there is no server at all.
    """
    if server is not None and service is not None:
        raise UsageError("--server and --service: give one of them, an assessment is of either")
    urls = {one.name: one.url for one in config.server}
    declared = {one.name: one.slo or config.slo.targets for one in config.server}
    expect = config.assess.expect_concurrency if expect_concurrency is None else expect_concurrency
    is_named = server is not None or service is not None
    scopes = _scopes(recall)
    if is_named:
        mine = [one for one in scopes if (one.server, one.service) == (server, service)]
        scopes = mine or [_Scope(server, service)]
    if not scopes:
        raise UsageError(
            f"{recall.path} knows no inference server yet: `agent run --config FILE` observes them"
        )
    prices = read_prices(config.prices.file) if config.prices.file else None
    found = []
    for scope in scopes:
        is_part = scope.is_replica and not (is_named and expect_concurrency is not None)
        members = recall.servers(scope.server, scope.service)
        own = next((declared[name] for name in sorted(members) if name in declared), None)
        targets = slo if slo is not None else (config.slo.targets if own is None else own)
        found.append(
            assess(
                recall,
                server=scope.server,
                service=scope.service,
                window_s=config.assess.window_s if window_s is None else window_s,
                slo=targets,
                expect_concurrency=None if is_part else expect,
                trains=config.assess.trains,
                open_minutes=open_minutes,
                now_s=now_s,
                urls=urls,
                needs=config.assess.rules.over(Needs()),
                thresholds=config.assess.rules.over(DEFAULTS),
                prices=prices,
            )
        )
    return found


class _Scope(NamedTuple):
    server: str | None
    service: str | None
    is_replica: bool = False  # one of several servers of a service


def _scopes(recall: Recall) -> list[_Scope]:
    servers = recall.servers()
    services: dict[str, list[str]] = defaultdict(list)
    for one in recall.sources():
        if one["service"] is not None and one["name"] in servers:
            services[one["service"]].append(one["name"])
    several = {service: names for service, names in services.items() if len(names) > 1}
    replicas = {name for names in several.values() for name in names}
    return [
        *(_Scope(name, None, name in replicas) for name in servers),
        *(_Scope(None, service) for service in several),
    ]


# By server, oldest first, as `Recall.fingerprints` tells them.
_Prints = Mapping[str, Sequence[Mapping[str, Any]]]


class _Asked(NamedTuple):
    servers: tuple[str, ...]
    scope: str
    now_s: float
    urls: Mapping[str, str]


class _Choice(NamedTuple):
    """The curve that is judged by. `levels` are a sweep's, or those that production showed."""

    used: CurveUsed
    levels: list[Level]
    sweep: Sweep | None
    notes: tuple[str, ...]  # what was not used, and why
    limits: tuple[tuple[int, str], ...] = ()
    wrong: Reason | None = None  # why the curve does not count


# ----------------------------------------------------------------------------------------- window


def _window(
    recall: Recall,
    asked: _Asked,
    owners: Mapping[str, Sequence[str]],
    window_s: float,
    open_minutes: Iterable[Minute],
) -> tuple[Window, tuple[str, ...]]:
    """The minutes of the servers and their GPUs, up to the newest sample; what it lacks."""
    still_open = list(open_minutes)
    newest_s = recall.newest_unix_s(asked.now_s)
    known = [one.start_unix_s for one in still_open] + ([newest_s] if newest_s is not None else [])
    last_s = max(known, default=asked.now_s)
    end_s = min(asked.now_s, (math.floor(last_s / MINUTE_S) + 1) * MINUTE_S)
    gpus, notes = _gpus(recall, owners)
    if asked.now_s - end_s > STALE_S:
        old = span(asked.now_s - end_s)
        notes += (f"newer samples: the newest is {old} old; is `agent run` still running?",)
    window = Window(end_s - window_s, end_s, servers=asked.servers, gpus=gpus)
    speakers = recall.speakers(*GPU) if gpus is None or gpus else []
    sources = {**dict.fromkeys(speakers, GPU), **dict.fromkeys(asked.servers, SERVER_SERIES)}
    for source, names in sources.items():
        window.add_records(recall.records(source, window.origin_unix_s, end_s, names))
    window.add_all(one for one in still_open if one.source in sources)
    return window, notes


def _gpus(
    recall: Recall, owners: Mapping[str, Sequence[str]]
) -> tuple[list[str] | None, tuple[str, ...]]:
    """The GPUs of these servers: None for all there are, which are theirs if nobody else is there.

    Energy is never booked to a server whose GPUs are not known beside others.
    """
    if all(owners.values()):
        return sorted({gpu for gpus in owners.values() for gpu in gpus}), ()
    if set(recall.servers()) <= set(owners):
        return None, ()
    return [], ("which GPUs it runs on ([[server]] gpus): without them no energy is booked to it",)


def _observed_line(window: Window, seen: Pattern) -> str:
    begin_s, end_s = seen.end_unix_s - seen.window_s, seen.end_unix_s
    servers = ", ".join(window.servers)
    gaps = f", {span(seen.gaps_s)} of it not observed" if seen.gaps_s >= MINUTE_S else ""
    return f"the minutes of {servers} from {utc(begin_s)} to {utc(end_s)}{gaps}"


# ------------------------------------------------------------------------------------------ curve


def _choose(
    recall: Recall,
    asked: _Asked,
    owners: Mapping[str, Sequence[str]],
    prints: _Prints,
    window: Window,
) -> _Choice:
    """The newest measured curve that fits, else what production showed, else none."""
    models = {name: model_of(found) for name, found in prints.items()}
    notes: list[str] = []
    gpus = {gpu for mine in owners.values() for gpu in mine}
    found = fitting(recall, models, asked.urls, gpus, notes)
    if found is not None:
        return _dated(found, prints, notes)
    passive = passive_curve(window)
    levels = passive.levels()
    kind: Literal["passive", "none"] = "passive" if levels else "none"
    note = f"the passive curve, {passive.note}" if levels else f"no curve: {passive.note}"
    return _Choice(CurveUsed(kind, note=note), levels, None, tuple(notes), _steadiness(passive))


def _is_simulated(prints: _Prints) -> bool:
    return any(SIMULATED in found[-1]["data"].items() for found in prints.values() if found)


def _steadiness(passive: Passive) -> tuple[tuple[int, str], ...]:
    few = passive.minutes_used < 60
    return ((1, f"only {passive.minutes_used} steady minutes"),) if few else ()


def _dated(found: Fitting, prints: _Prints, notes: list[str]) -> _Choice:
    """The measured curve, with what holds its weight down."""
    row, sweep = found.row, found.sweep
    measured_s = _unix_s(row["started_at"]) or row["received_unix_s"]
    limits: list[tuple[int, str]] = []
    changed_s = max((p[-1]["since_unix_s"] for p in prints.values() if len(p) > 1), default=0.0)
    if changed_s > measured_s:
        limits.append((1, f"model, version or flags changed on {utc(changed_s)}, after the sweep"))
        notes.append("a sweep since model, version or flags changed")
    wrong = next((why for p in prints.values() if (why := _differs(p, measured_s))), None)
    if found.by == "model":
        limits.append((1, "the curve is of this model, but perhaps of another machine"))
        notes.append("whether the curve is of this server: `agent import FILE --server NAME`")
    how = {"server": "its server's name", "url": "its address", "model": "its model alone"}
    place = address(sweep.target.url)
    where = f" at {place}" if place else ""
    note = f"curve {row['id']}, measured {utc(measured_s)}{where}, known by {how[found.by]}"
    used = CurveUsed("measured", row["id"], found.by, utc(measured_s), note)
    if found.by == "model":
        wrong = None  # it is no claim of this server's settings
    return _Choice(used, sweep.levels, sweep, tuple(notes), tuple(limits), wrong)


def _differs(prints: Sequence[Mapping[str, Any]], measured_s: float) -> Reason | None:
    """Whether the settings a sweep was made with are no longer those of the server."""
    if not prints:
        return None
    then = [one for one in prints if one["since_unix_s"] <= measured_s]
    before, now = (then or prints)[-1 if then else 0], prints[-1]
    if same_settings(before["data"], now["data"]):
        return None
    keys = sorted(before["data"].keys() | now["data"].keys())
    changed = [key for key in keys if before["data"].get(key) != now["data"].get(key)]
    return Reason(
        "FINGERPRINT_DIFFERS",
        f"{', '.join(changed[:3])} changed on {utc(now['since_unix_s'])}, after the sweep",
        {"changed": changed, "since_unix_s": now["since_unix_s"], "measured_unix_s": measured_s},
    )


def _unix_s(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _target(asked: _Asked, choice: _Choice) -> str:
    """What a sweep of it would be given."""
    if choice.sweep and choice.sweep.target.url:
        return choice.sweep.target.url
    return next((asked.urls[name] for name in asked.servers if name in asked.urls), "URL")


# ----------------------------------------------------------------------------------------- judging


DRAWN = 200_000  # requests of the busiest hours, to be replayed a part of


def _tried(
    scene: Scene,
    choice: _Choice,
    window: Window,
    limits: tuple[tuple[int, str], ...],
    thresholds: Thresholds,
) -> Scene:
    """The scene with what the replay says, and what half of the device would hold."""
    if scene.curve != "measured" or not scene.slo:
        return scene
    replayed, why_not = _trial(scene, choice, window)
    halves = _held_half(scene, choice, limits, thresholds) if scene.replicas == 1 else {}
    note = (f"not on a replay: {why_not}",) if why_not else ()
    return msgspec.structs.replace(
        scene, trial=replayed, held_half=halves, rests_on=(*scene.rests_on, *note)
    )


def _trial(scene: Scene, choice: _Choice, window: Window) -> tuple[Trial | None, str]:
    """The replay, or why there is none: it is of this box and of lengths that were swept."""
    if choice.sweep is None or choice.used.by == "model":
        return None, "the curve is perhaps of another machine"
    if choice.wrong is not None:
        return None, choice.wrong.because
    if not lengths_alike(choice.sweep, *_means(scene.pattern)):
        return None, "the sweep's lengths are not known to be production's"
    if not (window.has("prompt_length_tokens_count") and window.has("output_length_tokens_count")):
        return None, "of the lengths no more than their means are told"
    rng = np.random.default_rng(0)
    try:
        engine = fitted(choice.sweep)
        bunched, even = (
            arrivals.observed(window, scene.pattern, rng, dispersion=dispersion, most=DRAWN)
            for dispersion in (None, 1.0)
        )
        found = trial(engine, bunched, scene.slo, even=even, replicas=scene.replicas, rng=rng)
        return found, ""
    except UsageError as error:
        return None, str(error)


def _held_half(
    scene: Scene,
    choice: _Choice,
    limits: tuple[tuple[int, str], ...],
    thresholds: Thresholds,
) -> dict[Unit, float | None]:
    """The load under which this device keeps half of the SLO's bounds in half of its cache.

    There, half the device would keep the SLO: everything takes at most twice as long on it.
    """
    halved = tuple(msgspec.structs.replace(one, bound_ms=one.bound_ms / 2) for one in scene.slo)
    small = [
        level
        for level in choice.levels
        if level.server and level.server.kv_usage_max is not None
        if level.server.kv_usage_max <= 0.5
    ]
    held = judge(
        small,
        curves.analyse(small, halved, thresholds),
        halved,
        observed=_observed(scene, choice, limits),
        thresholds=thresholds,
    ).capacity.get("held", {})
    return dict(held)


def _throttled(choice: _Choice, heat: scenes.Heat | None, needs: Needs) -> Reason | None:
    """A sweep with its clocks held down, of a server that otherwise runs free."""
    if heat is None or heat.share >= needs.throttled:
        return None
    hot, valid = throttled_levels(choice.levels), curves.points(choice.levels)
    if choice.sweep is None or len(hot) <= len(valid) / 2:
        return None
    return Reason(
        "THROTTLED",
        f"clocks were held down in {len(hot)} levels of the sweep, and in {heat.share:.1%} of the"
        " observed time",
        {"levels": len(hot), "observed_share": heat.share},
    )


def _judged(
    scene: Scene, choice: _Choice, limits: tuple[tuple[int, str], ...], thresholds: Thresholds
) -> Verdict | None:
    """The judge's verdict on the curve; null without levels to judge."""
    if not choice.levels:
        return None
    expect = scene.expect_concurrency
    return judge(
        choice.levels,
        curves.analyse(choice.levels, scene.slo, thresholds),
        scene.slo,
        expect_concurrency=None if expect is None else expect / scene.replicas,
        observed=_observed(scene, choice, limits),
        simulated=scene.simulated,
        thresholds=thresholds,
        target=scene.target,
        endpoint=choice.sweep.workload.endpoint if choice.sweep else "chat",
    )


def _observed(scene: Scene, choice: _Choice, limits: tuple[tuple[int, str], ...]) -> Observed:
    """The demand on one replica: what it rose to in 1 % (requests/s: 5 %) of the minutes.

    Its low end, a stand-in until it has a proper interval, is what it rose to in 5 % (requests/s:
    its mean). Requests/s mean nothing against a sweep of other lengths, and are then left out.
    """
    seen, share = scene.pattern, 1 / scene.replicas
    each = f" of each of {scene.replicas} replicas" if scene.replicas > 1 else ""
    demand: dict[Unit, float] = {}
    low: dict[Unit, float] = {}
    words: dict[Unit, str] = {}
    if seen.concurrency.p99 is not None and seen.concurrency.p95 is not None:
        demand["concurrency"] = seen.concurrency.p99 * share
        low["concurrency"] = seen.concurrency.p95 * share
        words["concurrency"] = f"P99 of the minutes of {scene.seen}{each}"
    rate = seen.requests_per_s
    if rate.p95 is not None and rate.mean is not None and _rates_compare(choice, seen):
        demand["rps"], low["rps"] = rate.p95 * share, rate.mean * share
        words["rps"] = f"P95 of the minutes of {scene.seen}{each}"
    return Observed(demand, low, words, limits, from_production=choice.sweep is None)


def _rates_compare(choice: _Choice, seen: Pattern) -> bool:
    alike = choice.sweep is not None and lengths_alike(choice.sweep, *_means(seen))
    return bool(alike) and all(one.request_throughput is not None for one in choice.levels)


def _limits(
    choice: _Choice, seen: Pattern, window: Window
) -> tuple[tuple[tuple[int, str], ...], tuple[str, ...]]:
    """What confidence is held to, and what forbids taking hardware away."""
    limits = list(choice.limits)
    doubts = [why for _, why in choice.limits]
    if choice.sweep is not None:
        alike = lengths_alike(choice.sweep, *_means(seen))
        if alike is None:
            limits.append((2, "whether prompts and answers were as long in the sweep is not known"))
            doubts.append("a sweep whose lengths are known to be production's (--workload-from)")
        elif not alike:
            limits.append((1, "production's prompts or answers are not as long as the swept ones"))
            doubts.append("a sweep with production's lengths (--workload-from AGENT_URL)")
        if _is_uneven(window):
            limits.append((1, "the replicas do not share the load evenly"))
            doubts.append("replicas that share the load evenly")
    if seen.covered_s < scenes.DAY_S:
        limits.append((1, f"only {span(seen.covered_s)} observed: no whole day"))
    elif seen.covered_s < 0.9 * scenes.WEEK_S:
        limits.append((2, f"{span(seen.covered_s)} observed: no whole week"))
    return tuple(limits), tuple(doubts)


def lengths_alike(
    sweep: Sweep, prompt_tokens: float | None, output_tokens: float | None
) -> bool | None:
    """Are these mean lengths those that were swept? None where one of them is not known."""
    pairs = (
        (swept(sweep, "prompt_tokens", sweep.workload.input_tokens), prompt_tokens),
        (swept(sweep, "output_tokens", sweep.workload.output_tokens), output_tokens),
    )
    known = [mean / swept for swept, mean in pairs if swept and mean]
    if len(known) < len(pairs):
        return None
    return all(1 / LENGTHS_FACTOR <= ratio <= LENGTHS_FACTOR for ratio in known)


def _means(seen: Pattern) -> tuple[float | None, float | None]:
    return seen.prompt_tokens_per_request.mean, seen.output_tokens_per_request.mean


def swept(sweep: Sweep, name: str, asked: int | str) -> float | None:
    """Mean length over the sweep's levels, else the fixed one that was asked for."""
    means = [mean for one in sweep.levels if (mean := getattr(one, name).mean) is not None]
    if means:
        return float(np.mean(means))
    return curves.mean_length(asked)


def _is_uneven(window: Window) -> bool:
    """Is one replica busier than its share, by more than chance and a slow balancer explain?"""
    if len(window.servers) < 2:
        return False
    loads = [
        float(
            np.nan_to_num(one.get("requests_running", "mean")).sum()
            + np.nan_to_num(one.get("requests_waiting", "mean")).sum()
        )
        for one in window.servers.values()
    ]
    return max(loads) > UNEVEN_FACTOR * float(np.mean(loads))


def _past(recall: Recall, asked: _Asked, prints: _Prints) -> list[Past]:
    """Earlier verdicts of the same configuration, newest first."""
    changed = [found[-1]["since_unix_s"] for found in prints.values() if len(found) > 1]
    changed_s = max(changed, default=0.0)
    return [
        Past(one["at_unix_s"], one["finding"], one["verdict"].get("found") or one["finding"])
        for one in recall.assessments(asked.scope, limit=200)
        if changed_s < one["at_unix_s"] < asked.now_s
    ]


def _since(recall: Recall, asked: _Asked, finding: str) -> str:
    """Since when the newest assessments in a row have found the same."""
    since_s = asked.now_s
    for one in recall.assessments(asked.scope, limit=1000):
        if one["finding"] != finding:
            break
        since_s = one["at_unix_s"]
    return utc(since_s)


# ------------------------------------------------------------------------------------------ advice


def _known(
    recall: Recall,
    asked: _Asked,
    prints: _Prints,
    scene: Scene,
    choice: _Choice,
    prices: Prices | None,
    served: Target | None,
) -> Known:
    """What advice is made from: the engines are alike, so one server's settings are of all."""
    first = prints[asked.servers[0]]
    settings = first[-1]["data"] if first else {}
    measured_s = _unix_s(choice.used.measured_at or "")
    return Known(
        levels=choice.levels,
        slo=scene.slo,
        sweep=choice.sweep,
        measured_unix_s=measured_s,
        pattern=scene.pattern,
        replicas=len(asked.servers),
        settings={key.rpartition(".")[2]: str(value) for key, value in settings.items()},
        prices=prices or catalogue(),
        trains=scene.trains,
        expect_concurrency=scene.expect_concurrency,
        least_s=scene.needs.idle_s,
        history=_history(recall, asked) if measured_s is not None else (),
        host_j=_host_j(recall, asked, scene.pattern),
        target=scene.target,
        served=served,
    )


def _served(recall: Recall, owners: Mapping[str, Sequence[str]], prints: _Prints) -> Target | None:
    """Model and GPUs of one replica, as the agent saw them; null where they differ."""
    on = [recall.gpus(owners[name]) for name in prints]
    models = {model_of(found) for found in prints.values()}
    if not all(on) or len({tuple(one.name for one in gpus) for gpus in on}) > 1 or len(models) > 1:
        return None
    return Target(model=models.pop() or "", gpus=on[0])


def _placed(choice: _Choice, served: Target | None) -> _Choice:
    """The choice with the GPUs that the agent saw, where a sweep of this server tells of none."""
    sweep = choice.sweep
    if served is None or sweep is None or sweep.target.gpus or sweep.run.simulated:
        return choice
    if choice.used.by == "model":
        return choice
    target = msgspec.structs.replace(sweep.target, gpus=served.gpus)
    return choice._replace(sweep=msgspec.structs.replace(sweep, target=target))


def _history(recall: Recall, asked: _Asked) -> list[tuple[float, Mapping[str, Any]]]:
    """Earlier assessments' costs; a prediction can be scored only once there is a second curve."""
    if len(recall.curves()) < 2:
        return []
    kept = recall.assessments(asked.scope, limit=1000)
    return [(one["at_unix_s"], one["verdict"].get("cost", {})) for one in kept]


_HERE = ("127.0.0.1", "::1", "localhost")


def _host_j(recall: Recall, asked: _Asked, seen: Pattern) -> float | None:
    """Energy of this machine's processors and memory, where it runs these servers and no other.

    A counter of the whole platform has the others in it.
    """
    urls = [asked.urls.get(name, "") for name in asked.servers]
    if set(recall.servers()) - set(asked.servers):
        return None
    if not all(urlsplit(url).hostname in _HERE for url in urls):
        return None
    from agent.sources import HOST  # with an event loop, which is not needed elsewhere here

    joules: dict[str, float] = defaultdict(float)
    begin_s = seen.end_unix_s - seen.window_s
    for minute in recall.minutes(HOST, begin_s, seen.end_unix_s, ("host_energy_j",)):
        for value in minute.values:
            joules[dict(value.labels).get("domain", "")] += value.increase or 0.0
    whole = [used for domain, used in joules.items() if domain.endswith("psys")]
    return math.fsum(whole or joules.values()) or None
