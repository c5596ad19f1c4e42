"""A run as files that users of other tools read on, each figure by that tool's own definition.

Those tools know no steady window: they count a level from its first request to its last. So their
figures differ from ours in the same run, and are not mixed with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.model import Sweep, UsageError
from loadgen.kept import Kept
from loadgen.report.others import aiperf, guidellm, vllm
from loadgen.report.others.common import Point

FORMATS = ("aiperf", "guidellm", "vllm")


def documents(form: str, sweep: Sweep, requests: Sequence[Kept]) -> dict[str, dict[str, Any]]:
    """The files of a run by their names, as the tool itself would name them.

    AIPerf and vLLM have one load point a file, GuideLLM all of them in one. Raises UsageError where
    the store has no requests to work the figures out of.
    """
    points = _points(sweep, requests)
    if form == "guidellm":
        return {"benchmarks.json": guidellm.report(points)}
    tool = {"aiperf": aiperf, "vllm": vllm}[form]
    files: dict[str, dict[str, Any]] = {}
    for point in points:
        repeat = sum(other.load_name == point.load_name for other in points[: point.index])
        files[tool.file_name(point, repeat)] = tool.document(point)
    return files


def _points(sweep: Sweep, requests: Sequence[Kept]) -> list[Point]:
    points = [Point(sweep, index, requests[index]) for index in range(len(sweep.levels))]
    empty = [str(point.index + 1) for point in points if not point.requests.n]
    if empty or not points:
        which = f"level {', '.join(empty)}" if empty else "any level"
        raise UsageError(
            f"run {sweep.run.id}: the store has no requests of {which}, and other tools' figures "
            "are worked out of them; --format json, csv and parquet need none"
        )
    return points
