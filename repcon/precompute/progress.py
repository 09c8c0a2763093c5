"""What `repcon precompute` shows and logs while it works, and its figures at the end."""

import threading
import time
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from repcon.runtime.console import console, progress
from repcon.runtime.run_dir import RunDir
from repcon.runtime.text import format_bytes

_LOG_SECONDS = 5.0
_SHOWN_MISSING = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What a worker has done since its last event; events of several workers add up."""

    images: int = 0
    """Decoded images; one that is decoded again for further crops counts again."""
    crops: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    """Of these, how long the teachers had nothing to do: no pixels yet, or no room for their answers."""
    unit: str = ""
    """The unit that was written, if one was."""
    written_bytes: int = 0
    missing: tuple[tuple[str, str], ...] = ()
    """Images that could not be decoded: key and reason."""
    missing_crops: int = 0
    """Crops of these images, which no teacher answers."""
    remaining_crops: int | None = None
    """Crops of the units that no process has finished."""
    note: str = ""
    """A message for the user."""


class Display:
    """One progress line for all workers, and `metrics.jsonl`; `on_event` may be called from any thread.

    The line counts crops that were answered since the start, of `crops` that the store lacked then.
    """

    def __init__(self, record: RunDir, *, crops: int) -> None:
        self._record, self._total = record, crops
        self._bars = progress()
        self._task = self._bars.add_task("precompute", total=crops, unit="crops", note="")
        self._others_crops = self._missing_crops = 0
        self._lock = threading.Lock()
        self._started = self._logged = time.monotonic()
        self.images = self.crops = self.units = self.written_bytes = 0
        self._seconds = self._waited = 0.0
        self.missing: list[tuple[str, str]] = []

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def on_event(self, event: Event) -> None:
        """Adds an event to the totals, shows and logs it."""
        with self._lock:
            self.images += event.images
            self.crops += event.crops
            self._seconds += event.seconds
            self._waited += event.waited_seconds
            self.written_bytes += event.written_bytes
            self._missing_crops += event.missing_crops
            if event.note:
                self._bars.console.print(event.note, style="yellow", markup=False, soft_wrap=True)
                self._record.log("note", text=event.note)
            for key, reason in event.missing:
                self._report_missing(key, reason)
            if event.unit:
                self.units += 1
                self._record.log("unit", unit=event.unit, written_bytes=event.written_bytes, **self._rates())
            self._advance(event)

    def _advance(self, event: Event) -> None:
        if event.remaining_crops is not None:
            finished = self._total - event.remaining_crops - self._missing_crops
            # Processes that were started by another command have answered the rest.
            self._others_crops = max(self._others_crops, finished - self.crops)
        rates = self._rates()
        # Short: the line has to fit 80 columns with crops, crops/s and the time left.
        note = f"{rates['images_per_second']:,.1f} images/s, {100 * rates['waited_share']:.0f} % waiting"
        note += f", {format_bytes(self.written_bytes)}"
        done, total = self.crops + self._others_crops, self._total - self._missing_crops
        self._bars.update(self._task, completed=done, total=total, note=note)
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            self._record.log("progress", images=self.images, crops=self.crops, **rates)

    def _report_missing(self, key: str, reason: str) -> None:
        self.missing.append((key, reason))
        self._record.log("missing", image=key, reason=reason)
        if len(self.missing) <= _SHOWN_MISSING:
            self._bars.console.print(f"[yellow]missing[/] {escape(reason)}", soft_wrap=True, highlight=False)

    def _rates(self) -> dict[str, float]:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        return {
            "images_per_second": round(self.images / elapsed, 3),
            "crops_per_second": round(self.crops / elapsed, 3),
            "waited_share": round(self._waited / self._seconds, 4) if self._seconds else 0.0,
        }

    def figures(self) -> dict[str, Any]:
        """The run's totals."""
        return {
            "images": self.images,
            "crops": self.crops,
            "units": self.units,
            "seconds": round(time.monotonic() - self._started, 3),
            **self._rates(),
            "written_bytes": self.written_bytes,
        }


def show(figures: dict[str, Any]) -> None:
    """The table at the end."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("teachers", escape(", ".join(figures["teachers"]))),
        ("crops answered", f"{figures['crops']:,}"),
        ("images decoded", f"{figures['images']:,}"),
        ("seconds", f"{figures['seconds']:,.1f}"),
        ("crops/s", f"{figures['crops_per_second']:,.1f}"),
        ("images/s", f"{figures['images_per_second']:,.1f}"),
        ("teachers waited", f"{100 * figures['waited_share']:.1f} %"),
        ("written", format_bytes(figures["written_bytes"])),
        ("images missing", f"{figures['missing']:,}"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
