"""Which stored curve is whose: what verdicts are made by, and what page and exporters show.

One rule for all of them, so that nobody is shown a curve that the verdict refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from agent.model import Sweep
from agent.recall import Recall
from agent.sizing import curve as curves


class Fitting(NamedTuple):
    """A stored curve and what it is known by."""

    by: Literal["server", "url", "model"]
    row: dict[str, Any]
    sweep: Sweep


def fitting(
    recall: Recall,
    models: Mapping[str, str | None],
    urls: Mapping[str, str],
    gpus: Collection[str],
    notes: list[str],
) -> Fitting | None:
    """The newest that was measured on these servers; else of their address; else of their model.

    `models`: what each server serves, `urls`: where it is, both where known; `gpus`: theirs.
    Replicas have a curve together only where all serve one model. What was not used, and why, goes
    to `notes`.
    """
    if len(set(models.values())) != 1 or (len(models) > 1 and None in models.values()):
        told = ", ".join(f"{name}: {model or 'not known'}" for name, model in models.items())
        notes.append(
            f"replicas known to serve one model ({told}): a sweep of one server says nothing of"
            " the others; `--server NAME` judges each by its own"
        )
        return None
    model = next(iter(models.values()))
    ways = [(row, _known_by(row, models, urls)) for row in recall.curves()]
    for way in ("server", "url", "model"):
        for row, by in ways:
            if by != way:
                continue
            sweep = recall.curve(row["id"])
            why = _unfit(row, sweep, gpus, model)
            if why is None:
                return Fitting(by, row, sweep)
            notes.append(f"a curve that fits: curve {row['id']} {why}, so it was not used")
    return None


def model_of(fingerprints: Sequence[Mapping[str, Any]]) -> str | None:
    """The model of the newest fingerprint."""
    if not fingerprints:
        return None
    found = fingerprints[-1]["data"].get("model")
    return str(found) if found else None


def address(url: str) -> str:
    """Host and port, without a user's name; empty where a file's URL is none."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""


def _known_by(
    row: Mapping[str, Any], models: Mapping[str, str | None], urls: Mapping[str, str]
) -> Literal["server", "url", "model"] | None:
    """A curve of another server by name is of that one, whatever model it serves."""
    if row["source"] is not None:
        return "server" if row["source"] in models else None
    place = address(row["url"])
    if place and place in {*models, *(address(urls.get(name, "")) for name in models)}:
        return "url"
    model = next(iter(models.values()))
    return "model" if model is not None and row["model"] in model.split(",") else None


def _unfit(
    row: Mapping[str, Any], sweep: Sweep, gpus: Collection[str], model: str | None
) -> str | None:
    if model is not None and row["model"] and row["model"] not in model.split(","):
        return f"is of {row['model']}, and {model} is served now"
    swept_on = {one.uuid for one in sweep.target.gpus if one.uuid}
    if swept_on and gpus and not swept_on & set(gpus):
        return "was measured on other GPUs"
    if not curves.points(sweep.levels):
        return "has no valid level"
    return None
