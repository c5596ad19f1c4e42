"""The tables of the agent's store, step by step, and the views that plain SQL reads them by.

Whatever grows is keyed by time first: writing is appending, forgetting is deleting at the front.
A question about one series walks the blocks of time (`agent.recall`), one look-up each. What is
still being added to lies in a table `…_open` in the order it came, and moves to its place in one
go when its block is over: a batch touches a few pages, not one per series.

The key is one number, block << 32 | series << 12 | minute << 6 | part, because SQLite fills the
pages of appended numbers to 99 % and those of keys of several columns to 88 % (of chunks, to 56 %).
The columns that it is made of can be selected all the same; they are computed, and take no room.
"""

from __future__ import annotations

SERIES_ID_MAX = 2**20 - 1
PART_MAX = 2**6 - 1
APPLICATION_ID = 0x53464954  # "SFIT": `file` and we know whose database it is
RAW_BLOCK_S = 600
HOUR_S = 3600

# A value that equals the minute's last one is null, and so are mean, min and max of a counter:
# constant series and counters are half of all rows, and take half the bytes so.
_VALUES = """
    n integer not null, mean real, min real, max real, last real, increase real, counts text"""
_READ_VALUES = """
    n, coalesce(mean, last) as mean, coalesce(min, last) as min, coalesce(max, last) as max,
    last, increase, counts, bounds"""


def key(block: int, series: int, minute: int = 0, part: int = 0) -> int:
    return block << 32 | series << 12 | minute << 6 | part


def state_key(source: str) -> str:
    """Where `meta` keeps what a source's minutes go on from (`agent.minutes.Minutes.dump`)."""
    return f"minutes of {source}"


def _computed(*columns: str) -> str:
    how = {"series": "key >> 12 & 1048575", "minute": "key >> 6 & 63", "part": "key & 63"}
    return ", ".join(
        f"{name} integer generated always as ({how.get(name, 'key >> 32')}) virtual"
        for name in columns
    )


_FIRST = (
    "create table meta(key text primary key, value) without rowid",
    # gpus: a JSON list of UUIDs; of a server, those it runs on
    """create table sources(id integer primary key, name text not null unique, service text,
       gpus text not null default '[]')""",
    # labels: a JSON object; bounds: of a histogram, a JSON list whose last is null for +inf
    """create table series(id integer primary key, source integer not null, name text not null,
       labels text not null, bounds text not null default '',
       unique(source, name, labels, bounds))""",
    # raw readings as they come, and packed by agent.chunks, block = unix_s // 600; a block that was
    # packed twice (a clock set back, a restart) has parts
    "create table raw_open(at_ms integer not null, series integer not null, value real not null)",
    f"""create table raw(key integer primary key, points blob not null,
       {_computed("block", "series", "part")})""",
    # hour = unix_s // 3600, minute = 0 … 59; a minute lived through twice has parts
    f"""create table minute_open(hour integer not null, minute integer not null,
       series integer not null, part integer not null, {_VALUES},
       primary key(hour, minute, series, part)) without rowid""",
    f"""create table minute(key integer primary key, {_VALUES},
       {_computed("hour", "series", "minute", "part")})""",
    f"""create table hour(key integer primary key, {_VALUES}, {_computed("hour", "series")})""",
    # covered_s: watched; counted_s: what increases are of, gaps included; finished = 0: the minute
    # went on when this was written
    """create table minute_source(hour integer not null, source integer not null,
       minute integer not null, part integer not null, covered_s real not null,
       counted_s real not null, resets integer not null, marks text, finished integer not null,
       primary key(hour, source, minute, part)) without rowid""",
    """create table hour_source(hour integer not null, source integer not null,
       covered_s real not null, counted_s real not null, resets integer not null,
       primary key(hour, source)) without rowid""",
    """create table events(id integer primary key, at_unix_s real not null, kind text not null,
       source text, text text not null, data text)""",
    "create index events_at on events(at_unix_s)",
    """create table fingerprints(id integer primary key, source text not null,
       since_unix_s real not null, fingerprint text not null, data text not null)""",
    "create index fingerprints_of on fingerprints(source, since_unix_s)",
    """create table curves(id integer primary key, key text not null unique,
       received_unix_s real not null, source text, started_at text not null, url text not null,
       model text not null, engine text, levels integer not null, simulated integer not null,
       sweep text not null)""",
    """create table assessments(id integer primary key, at_unix_s real not null,
       scope text not null, finding text not null, verdict text not null)""",
    "create index assessments_of on assessments(scope, at_unix_s)",
    f"""create view minutes as
       select sources.name as source, series.name as name, labels, part,
         hour * 3600 + minute * 60 as start_unix_s, {_READ_VALUES}
       from (select hour, minute, series, part, n, mean, min, max, last, increase, counts
               from minute
             union all
             select hour, minute, series, part, n, mean, min, max, last, increase, counts
               from minute_open) as kept
       join series on series.id = kept.series join sources on sources.id = series.source""",
    f"""create view hours as
       select sources.name as source, series.name as name, labels,
         hour * 3600 as start_unix_s, {_READ_VALUES}
       from hour join series on series.id = hour.series
       join sources on sources.id = series.source""",
    """create view minutes_covered as
       select name as source, hour * 3600 + minute * 60 as start_unix_s, part, covered_s, resets,
         marks, finished
       from minute_source join sources on sources.id = source""",
    """create view recent as
       select sources.name as source, series.name as name, labels, at_ms / 1000.0 as at_unix_s,
         value
       from raw_open join series on series.id = raw_open.series
       join sources on sources.id = series.source""",
)

# Requests one by one, as a server's own spans tell them; what it did not tell is null.
_SERVED = (
    """create table served(id integer primary key, at_ms integer not null, source integer not null,
       model text, prompt_tokens integer, output_tokens integer, e2e_ms real, ttft_ms real,
       queue_ms real, prefill_ms real, decode_ms real, energy_j real)""",
    "create index served_at on served(at_ms)",
)

# What the GPUs are whose UUIDs stand in `sources` and in labels; null: the driver does not say.
_GPUS = (
    """create table gpus(uuid text primary key, name text not null,
       memory_bytes integer) without rowid""",
)

# Forward only: a step that was released is never changed, a new one is put behind it.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_FIRST, _SERVED, _GPUS)

# A minute's rows go to their place, and its hour is made of them; both may be done again.
MOVE_MINUTES = """
    insert or replace into minute (key, n, mean, min, max, last, increase, counts)
    select (hour << 32) + (series << 12) + (minute << 6) + part as key,
      n, mean, min, max, last, increase, counts
    from minute_open where hour = :hour order by key"""
ROLL_HOUR = """
    insert or replace into hour (key, n, mean, min, max, last, increase)
    select key, n, nullif(mean, last), nullif(min, last), nullif(max, last), last, increase
    from (select key & -4096 as key, sum(n) as n,
            iif(count(increase) = count(*), null,
              sum(coalesce(mean, last) * max(n, 1)) / sum(max(n, 1))) as mean,
            iif(count(increase) = count(*), null, min(coalesce(min, last))) as min,
            iif(count(increase) = count(*), null, max(coalesce(max, last))) as max,
            sum(increase) as increase,
            (select last from minute as l where l.key between m.key & -4096 and m.key | 4095
             order by l.key desc limit 1) as last
          from minute as m
          where key between :hour << 32 and (:hour + 1 << 32) - 1 and counts is null
          group by key >> 12)
    order by key"""
ROLL_SOURCES = """
    insert or replace into hour_source (hour, source, covered_s, counted_s, resets)
    select hour, source, sum(covered_s), sum(counted_s), sum(resets)
    from minute_source where hour = :hour group by source"""
