"""How it goes, told while it runs: a few lines drawn anew on a terminal, plain lines elsewhere.

Written by hand: a display library that redraws from a thread would be measured together with the
server. The lines are made where the measuring loop has a turn to spare, twice a second, and go to
the terminal without ever waiting for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

import msgspec

from agent.failures import abandon
from agent.model import Level
from agent.words import printable
from loadgen.report.frame import ASCII, UNICODE, Glyphs, Line, Sight, frame
from loadgen.report.terminal import level_parts, load_text

if TYPE_CHECKING:
    from loadgen.moment import Moment
    from loadgen.schedule import Upcoming

SIZE = os.terminal_size((80, 24))  # of a terminal that does not tell
SMALLEST = os.terminal_size((20, 2))
STYLES = {"bold": "\x1b[1m", "dim": "\x1b[2m", "red": "\x1b[31m"}
PLAIN, CLEAR_LINE, CLEAR_BELOW = "\x1b[0m", "\x1b[K", "\x1b[J"
# While a frame is drawn, and never longer: no cursor, and no wrapping of lines, for a window may
# have become narrower a moment ago.
BEGIN, END = "\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h"


class Progress:
    """Tells how it goes on `out`.

    `quiet` leaves nothing but notes; `live` None: as `out` is a terminal or not. `ended`: levels of
    a run that is taken up again.
    """

    def __init__(
        self, out: TextIO | None = None, *, quiet: bool = False, live: bool | None = None,
        ended: Sequence[Level] = (),
    ) -> None:  # fmt: skip
        self._out = out or sys.stderr
        self._quiet = quiet
        dumb = os.environ.get("TERM") == "dumb"
        is_live = (self._out.isatty() and not dumb) if live is None else live
        self._screen = _Screen(self._out) if is_live and not quiet else None
        self._glyphs = _glyphs(self._out)
        self._sight: Sight | None = None
        self._ended = tuple(ended)

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def line(self, text: str) -> None:
        if not self._quiet:
            self._say(text)

    def level_began(self, number: int, upcoming: Upcoming, *, simulated: bool) -> None:
        place = place_text(number, upcoming, simulated=simulated)
        self._sight = Sight(place, upcoming.plan, upcoming.why)
        if self._screen is None:
            parts = (upcoming.why or "running", upcoming.left)
            self.line(f"{place}: {' · '.join(filter(None, parts))}")
        self._draw()

    def level_moved(self, state: Moment) -> None:
        if self._sight is not None and self._screen is not None:
            self._sight = msgspec.structs.replace(self._sight, moment=state, ended=self._ended)
            self._draw()

    def level_ended(self, number: int, level: Level) -> None:
        self._ended += (level,)
        sight, self._sight = self._sight, None
        if sight is not None:
            parts = level_parts(level)
            self._said([f"{sight.place}: {parts[0]}", *parts[1:]])

    def close(self) -> None:
        """Leaves nothing on the terminal that is not to stay."""
        self._sight = None
        if self._screen is not None:
            self._write("")
            self._screen.close()

    def _draw(self) -> None:
        if self._screen is not None and self._sight is not None:
            columns, rows = self._screen.size
            # The last column is left free: there, terminals differ in when a line wraps.
            self._screen.draw(frame(self._sight, columns - 1, rows - 1, self._glyphs))

    def _said(self, parts: list[str]) -> None:
        """Parts of a line, in as many lines as they take on a terminal."""
        if self._quiet:
            return
        texts = [printable(part).translate(self._glyphs.words) for part in parts]
        between = " · ".translate(self._glyphs.words)
        lines = [texts[0]]
        for text in texts[1:]:
            longer = lines[-1] + between + text
            if self._screen is not None and len(longer) >= self._screen.size.columns:
                lines.append(f"  {text}")
            else:
                lines[-1] = longer
        self._write("\n".join(lines) + "\n")

    def _say(self, text: str) -> None:
        self._write(printable(text).translate(self._glyphs.words) + "\n")

    def _write(self, text: str) -> None:
        """Plain text that stays. A reader that has gone (`2>&1 | head`) must not take the
        measurement with it."""
        if self._screen is not None:
            text = self._screen.cleared() + text
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            abandon(self._out)


def place_text(number: int, upcoming: Upcoming, *, simulated: bool) -> str:
    """`[3/6] 16 streams, simulated`: which level, and of what."""
    plan, of = upcoming.plan, upcoming.of
    place = f"[{number}]" if of is None else f"[{number}/{of}]"
    return f"{place} {load_text(plan.mode, plan.load)}{', simulated' if simulated else ''}"


def _glyphs(out: TextIO) -> Glyphs:
    encoding = (getattr(out, "encoding", None) or "utf-8").lower().replace("-", "")
    return UNICODE if encoding in ("utf8", "utf16", "utf32") else ASCII


class _Screen:
    """Lines on a terminal that are drawn over again, the cursor left at the first of them.

    So the cursor stands where it did when the terminal is resized, whether the lines below are
    wrapped anew or cut, and all of them go by clearing from there to the end of the screen.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._descriptor = _unwaiting(out)
        self._drawn = False
        self._unsent = b""  # of a frame, where the terminal would not take all of it
        self._colour = not os.environ.get("NO_COLOR")

    @property
    def size(self) -> os.terminal_size:
        size = SIZE
        with suppress(OSError, ValueError):
            size = os.get_terminal_size(self._out.fileno())
        if not (size.columns and size.lines):  # a serial line knows none
            size = SIZE
        return os.terminal_size(map(max, size, SMALLEST))

    def draw(self, lines: list[Line]) -> None:
        """Draws over what was drawn; not at all while the terminal takes nothing."""
        if not self._sent():
            return
        text = f"{CLEAR_LINE}\r\n".join(map(self._styled, lines))
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        whole = f"{BEGIN}\r{text}{CLEAR_BELOW}{up}\r{END}"
        self._unsent = whole.encode(getattr(self._out, "encoding", None) or "utf-8", "replace")
        self._drawn = True
        self._sent()

    def cleared(self) -> str:
        """What takes the lines away, and what is still to be sent before."""
        rest, self._unsent = self._unsent.decode(errors="replace"), b""
        # Cleared from the second column on: from the first of the screen, tmux keeps what goes.
        text, self._drawn = f"{rest}\r {CLEAR_BELOW}\r" if self._drawn else "", False
        return text

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _styled(self, line: Line) -> str:
        style = STYLES.get(line.style, "") if self._colour else ""
        return f"{style}{line.text}{PLAIN}" if style else line.text

    def _sent(self) -> bool:
        """Sends what is to be sent; whether all of it went."""
        if not self._unsent:
            return True
        try:
            if self._descriptor is None:
                self._out.write(self._unsent.decode())
                self._out.flush()
                self._unsent = b""
            else:
                self._unsent = self._unsent[os.write(self._descriptor, self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = b""
            abandon(self._out)
        return not self._unsent


def _unwaiting(out: TextIO) -> int | None:
    """The terminal of `out` opened once more, so that a write to it never waits.

    One that is held (Ctrl-S) or far away would hold the measurement. The flag is of an opening,
    and the first one is the shell's too. None where it cannot be opened.
    """
    try:
        name = os.ttyname(out.fileno())
        return os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
