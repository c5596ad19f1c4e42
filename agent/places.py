"""Where minutes, hours and readings lie in the store, as pieces of SQL. Pure.

A question names its series and a window; `blocks` are then the hours (or open minutes) to look
into, and `on` finds the rows of a series there by their key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Literal, NamedTuple

from agent import schema

Kind = Literal["gauge", "counter", "histogram"]


class Place(NamedTuple):
    """A table of minutes or hours: how its row `k` is found, and when that begins.

    `blocks`: the numbers `block.at` from ?1 to ?2, the first and the last second that is asked for.
    """

    table: str
    on: str
    start: str
    blocks: str


# What is summed up of a kind, and what a row of it always has.
FIGURES: dict[Kind, str] = {
    "gauge": "sum(coalesce(mean, last) * max(n, 1)), sum(max(n, 1))",
    "counter": "sum(increase), sum(counted_s)",
    "histogram": "'[' || group_concat(counts) || ']'",
}
FIGURE: dict[Kind, str] = {"gauge": "last", "counter": "increase", "histogram": "counts"}
# The same as it is kept, of each record.
COLUMNS: dict[Kind, dict[str, str]] = {
    "gauge": {"last": "last"} | {one: f"coalesce({one}, last)" for one in ("mean", "min", "max")},
    "counter": {"increase": "increase"},
    "histogram": {"counts": "counts"},
}
_HOUR_BLOCKS = """with recursive block(at) as
    (select ?1 / 3600 union all select at + 1 from block where at < ?2 / 3600)"""
# Few hours are open, and their key is of minutes: each minute is looked up in them.
_OPEN_BLOCKS = """with recursive block(at) as
    (select max(?1 / 60, (select min(hour) * 60 from minute_open))
     union all select at + 1 from block where at < ?2 / 60)"""
# The first of a series' keys in a block, to the last.
_KEY = "(block.at << 32) + (s.id << 12)"
BY_KEY = f"k.key between {_KEY} and {_KEY} + 4095"
MINUTE_START = "(k.hour * 3600 + k.minute * 60)"
# Rising from record to record of a source.
PARTS = schema.PART_MAX + 1
NUMBER = f"(k.hour * 60 + k.minute) * {PARTS} + k.part"
HOURS = (Place("hour", BY_KEY, "k.hour * 3600", _HOUR_BLOCKS),)
MINUTES = (
    Place("minute", BY_KEY, MINUTE_START, _HOUR_BLOCKS),
    Place(
        "minute_open",
        "k.hour = block.at / 60 and k.minute = block.at % 60 and k.series = s.id",
        MINUTE_START,
        _OPEN_BLOCKS,
    ),
)


def ids(series: Collection[int]) -> str:
    """Ids of series as a table."""
    return f"(select id, source from series where id in ({', '.join(str(one) for one in series)}))"


def labels(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(json.loads(text).items()))


def bounds(text: str) -> tuple[float, ...]:
    return tuple(math.inf if one is None else one for one in json.loads(text)) if text else ()
