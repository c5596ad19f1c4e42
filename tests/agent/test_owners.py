"""Whose GPUs: what is configured, what processes tell, and what nobody may guess."""

from __future__ import annotations

import pytest

from agent.config import Server
from agent.owners import Owned, Processes, owned

DEVICES = ("GPU-a", "GPU-b")
ALL: Processes = {"GPU-a": {10: 1, 11: None}, "GPU-b": {20: 1}}
NONE_TOLD: Processes = {"GPU-a": {}, "GPU-b": {}}


@pytest.mark.parametrize(
    ("gpus", "processes", "pids", "alone", "expected"),
    [
        ((1,), ALL, {10}, True, Owned(("GPU-b",), "configuration")),
        (("GPU-x", 7), ALL, {10}, True, Owned(("GPU-x",), "configuration")),
        ((), ALL, {11, 99}, False, Owned(("GPU-a",), "process list")),
        ((), ALL, {20, 10}, False, Owned(DEVICES, "process list")),
        # Somebody else's processes are on every GPU: this server runs elsewhere.
        ((), ALL, {99}, True, Owned((), "unknown")),
        # A container sees no process: who is alone here has them all, of two nobody knows.
        ((), NONE_TOLD, set(), True, Owned(DEVICES, "only server")),
        ((), NONE_TOLD, set(), False, Owned((), "unknown")),
        ((), {}, {10}, True, Owned(DEVICES, "only server")),
    ],
)
def test_whose_gpus(
    gpus: tuple[int | str, ...], processes: Processes, pids: set[int], alone: bool, expected: Owned
) -> None:
    server = Server(gpus=gpus)
    found = owned(server, devices=DEVICES, processes=processes, pids=pids, is_alone_here=alone)
    assert found == expected


def test_without_gpus_there_is_nothing_to_own() -> None:
    found = owned(Server(), devices=(), processes={}, pids={1}, is_alone_here=True)
    assert found == Owned((), "unknown")
