"""Sweeps as they come out of real runs, with round enough numbers to check by eye."""

from __future__ import annotations

import random

import msgspec

from agent.model import (
    Confidence,
    Curve,
    GpuView,
    Knee,
    Lag,
    Level,
    Measurement,
    Overhead,
    Reason,
    Recommendation,
    Requests,
    Run,
    ServerView,
    Slo,
    SloCapacity,
    Stats,
    Sweep,
    Target,
    TargetGpu,
    Tokens,
    Verdict,
    Workload,
)

HOSTILE = '<img src=x onerror="window.pwned=1">\'"&</script><script>window.pwned=1</script>\u2028'

# concurrency, output tokens/s, TTFT p50 in ms, ITL p50 in ms, waiting, KV use, W
POINTS = (
    (1, 151.2, 21.4, 6.52, 0.0, 0.008, 372.0),
    (2, 298.7, 23.0, 6.61, 0.0, 0.016, 391.0),
    (4, 585.1, 25.8, 6.74, 0.0, 0.031, 417.0),
    (8, 1131.4, 28.9, 6.95, 0.0, 0.063, 446.0),
    (16, 2140.8, 34.2, 7.31, 0.0, 0.124, 489.0),
    (32, 3871.5, 45.7, 8.02, 0.0, 0.248, 538.0),
    (48, 5206.0, 52.3, 8.88, 0.0, 0.371, 566.0),
    (64, 6322.9, 61.5, 9.70, 0.0, 0.494, 590.0),
    (96, 7719.3, 88.0, 11.9, 0.1, 0.739, 627.0),
    (128, 8604.2, 131.0, 14.1, 2.8, 0.961, 648.0),
    (192, 8811.7, 2840.0, 14.4, 62.0, 0.987, 652.0),
    (256, 8790.4, 6120.0, 14.5, 125.6, 0.991, 651.0),
)

LOADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 288)


def stats(p50: float, spread: float = 1.6, n: int = 512) -> Stats:
    """A right-skewed sample around a median."""
    return Stats(
        mean=p50 * 1.07,
        std=p50 * 0.3,
        p50=p50,
        p90=p50 * (1 + (spread - 1) * 0.7),
        p95=p50 * spread,
        p99=p50 * spread * 1.35,
        p999=p50 * spread * 1.9,
        max=p50 * spread * 2.2,
        n=n,
    )


def level(point: tuple[float, ...], *, server: bool = True, gpu: bool = True) -> Level:
    concurrency, rate, ttft, itl, waiting, kv, watts = point
    e2e = ttft + 255 * itl * 1.05
    met = ttft * 1.9 < 500
    invalid = concurrency == 256
    return Level(
        concurrency=int(concurrency),
        started_at="2026-03-11T09:12:00Z",
        duration_s=62.0,
        window_s=57.3,
        requests=Requests(
            ok=int(rate * 62 / 256),
            failed=3 if concurrency == 192 else 0,
            cancelled=0,
            errors={"timeout": 2, "http_503": 1} if concurrency == 192 else {},
        ),
        tokens=Tokens(prompt=int(rate * 124), output=int(rate * 62), reasoning=0, source="usage"),
        request_throughput=rate / 256,
        output_tokens_per_s=rate,
        total_tokens_per_s=rate * 3,
        output_tokens_per_s_ci95=(rate * 0.972, rate * 1.031),
        ttft_ms=stats(ttft, 1.9),
        ttft_from_due_ms=stats(ttft + 0.4, 1.9),
        itl_ms=stats(itl, 1.5, n=40_000),
        tpot_ms=stats(itl * 1.05, 1.2),
        e2e_ms=stats(e2e, 1.25),
        prompt_tokens=stats(512, 1.1),
        output_tokens=stats(256, 1.1),
        goodput_rps=rate / 256 if met else 0.3,
        slo_attainment=0.998 if met else 0.04,
        slo_met=met,
        measurement=Measurement(
            valid=not invalid,
            reasons=[] if not invalid else ["send lag p99 34 ms is above the bound of 5 ms"],
            send_lag_ms=Lag(0.1, 34.0 if invalid else 0.6, 41.0),
            loop_lag_ms=Lag(None, 1.1, 2.0),
            client_cpu=0.7,
            in_flight_mean=concurrency,
            littles_law_error=0.01,
            foreign_requests=0,
        ),
        server=ServerView(
            running_mean=concurrency - waiting,
            running_max=concurrency,
            waiting_mean=waiting,
            waiting_max=waiting * 1.2,
            kv_usage_mean=kv * 0.93,
            kv_usage_max=kv,
            preemptions=11 if waiting > 10 else 0,
            prefix_hit_rate=0.02,
            kv_capacity_tokens=428_000,
            samples=58,
        )
        if server
        else None,
        gpu=[GpuView("GPU-1f", 74.1e9, 0.98, watts, watts * 62, 63.0, False)] if gpu else [],
        energy_j_per_output_token=watts / rate if gpu else None,
    )


def verdict() -> Verdict:
    return Verdict(
        finding="CAPACITY_ONLY",
        summary=(
            "This server holds 131 concurrent requests within the SLO and gives about 8,600 "
            "tokens/s there; beyond that KV cache memory is what binds."
        ),
        confidence=Confidence("medium", "one run; no repeats to tell drift from noise"),
        reasons=[
            Reason(
                "KV_MEMORY",
                "KV use reached 0.99 with 62 requests waiting while ITL stayed at 14 ms.",
                {
                    "kv_usage_max": 0.987,
                    "waiting_mean": 62.0,
                    "preemptions": 11,
                    "itl_p50_ms": [14.1, 14.4],
                },
            )
        ],
        rests_on=["11 valid levels of 62 s"],
        stability={"ttft_p99_over_p50": 2.57, "itl_p99_over_p50": 2.03},
        recommendation=Recommendation(
            action="Send at most 128 concurrent requests; more memory for KV would raise the cap.",
            confirm_with="loadgen sweep http://10.0.0.5:8000 --concurrency 112,128,144",
            overturned_by="prompts shorter than the 512 tokens measured here",
        ),
        missing=["observed demand: run the agent beside the server for a week"],
    )


def sweep(*, simulated: bool = False, server: bool = True, gpu: bool = True) -> Sweep:
    """Twelve levels of an 8B model on one H100: SLO missed from 192 on, 256 not valid."""
    return Sweep(
        run=Run(
            id="01JP2Q6Z",
            started_at="2026-03-11T09:10:31Z",
            command=(
                "loadgen sweep http://10.0.0.5:8000 --concurrency auto --input-tokens 512 "
                "--output-tokens 256 --slo 'ttft:p95<500ms,itl:p95<50ms' --seed 7"
            ),
            seed=7,
            tool_version="0.1.0",
            host="bench-1 (16 cores)",
            overhead=Overhead(3, 48, 240, 61_440),
            simulated=simulated,
        ),
        target=Target(
            url="http://10.0.0.5:8000",
            model="meta-llama/Llama-3.1-8B-Instruct",
            engine="vllm",
            engine_version="0.10.2",
            gpus=[TargetGpu("NVIDIA H100 80GB HBM3", "GPU-1f", 85_520_809_984)],
            fingerprint="9c41d0e2",
            server_note=None if server else "no /metrics at the target: 404",
            gpu_note=None if gpu else "the target is not on this machine; use --agent URL",
        ),
        workload=Workload("chat", "512", "256"),
        slo=[Slo("ttft", "p95", 500.0), Slo("itl", "p95", 50.0)],
        levels=[level(point, server=server, gpu=gpu) for point in POINTS],
        curve=Curve(
            knee=Knee(128, 8604.2),
            saturated=True,
            slo_capacity=SloCapacity(131.0, 33.7, 128.0, 192.0, True),
            limit="KV_MEMORY",
        ),
        verdict=verdict(),
    )


def large() -> Sweep:
    """Twenty levels, three times over, on eight GPUs; no number is round, as none is that was
    measured."""
    base = sweep()
    draw = random.Random(1)
    rows = [
        (load, *(value * draw.uniform(0.97, 1.03) for value in POINTS[min(i // 2, 11)][1:]))
        for _ in range(3)
        for i, load in enumerate(LOADS)
    ]
    gpus = [TargetGpu("NVIDIA H100 80GB HBM3", f"GPU-{i:036}", 85_520_809_984) for i in range(8)]
    views = [GpuView(gpu.uuid, 74.1e9 / 7, 1 / 3, 400 / 7, 24_800 / 7, 63.1, False) for gpu in gpus]
    levels = [msgspec.structs.replace(level(row), gpu=views) for row in rows]
    settings = {f"vllm:cache_config_info.setting_{i}": "some value" for i in range(40)}
    target = msgspec.structs.replace(base.target, gpus=gpus, settings=settings)
    return msgspec.structs.replace(base, target=target, levels=levels)


def by_rate() -> Sweep:
    """An open loop whose SLO was never broken: the capacity is a lower bound."""
    rates = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    levels = [
        msgspec.structs.replace(lv, mode="rate", concurrency=None, offered_rps=rate)
        for rate, lv in zip(rates, sweep(server=False, gpu=False).levels, strict=False)
    ]
    capacity = SloCapacity(31.0, 6.0, 6.0, None, False)
    curve = Curve(Knee(5.8, levels[-1].output_tokens_per_s or 0.0), False, capacity, None)
    base = sweep(server=False, gpu=False)
    workload = msgspec.structs.replace(base.workload, arrival="poisson")
    return msgspec.structs.replace(
        base, levels=levels, curve=curve, verdict=None, workload=workload
    )


def minimal() -> Sweep:
    """What another tool's numbers may amount to: one level with one number."""
    base = sweep()
    return msgspec.structs.replace(
        base,
        slo=[],
        curve=Curve(),
        verdict=None,
        levels=[Level(concurrency=4, output_tokens_per_s=585.1)],
    )


def hostile() -> Sweep:
    """Every free text is an attack."""
    base = sweep(simulated=True, server=False, gpu=False)
    replace = msgspec.structs.replace
    judged = verdict()
    bad = replace(
        base.levels[0],
        requests=Requests(1, 1, 0, {HOSTILE: 1}),
        measurement=Measurement(valid=False, reasons=[HOSTILE]),
    )
    return replace(
        base,
        run=replace(base.run, id=HOSTILE, command=HOSTILE, host=HOSTILE, started_at=HOSTILE),
        target=replace(
            base.target,
            url=HOSTILE,
            model=HOSTILE,
            engine=HOSTILE,
            gpus=[TargetGpu(HOSTILE, HOSTILE)],
            fingerprint=HOSTILE,
            server_note=HOSTILE,
            gpu_note=HOSTILE,
        ),
        workload=replace(base.workload, dataset=HOSTILE, trace=HOSTILE, arrival=HOSTILE),
        levels=[bad, *base.levels[1:]],
        curve=replace(base.curve, limit=HOSTILE),
        verdict=replace(
            judged,
            finding=HOSTILE,
            summary=HOSTILE,
            confidence=Confidence("low", HOSTILE),
            reasons=[Reason(HOSTILE, HOSTILE, {HOSTILE: {HOSTILE: [HOSTILE]}})],
            qualifier={HOSTILE: HOSTILE},
            stability={HOSTILE: HOSTILE},
            rests_on=[HOSTILE],
            missing=[HOSTILE],
            recommendation=Recommendation(HOSTILE, HOSTILE, 0.1, 0.2, HOSTILE, HOSTILE, HOSTILE),
        ),
    )
