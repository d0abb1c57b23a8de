"""``blockvirt snapshot diff``: what changed, printed as it comes: a large volume has millions of ranges."""

import json
from collections.abc import Iterator
from typing import Any

import click

from blockvirt.cli.client import Client, segment
from blockvirt.cli.context import Context, pass_context
from blockvirt.cli.output import output_option, size_for_people, whole_output
from blockvirt.limits import API_MAX_CHANGES


class Changes:
    """The ranges that differ, read page by page, and their sums so far."""

    def __init__(self, client: Client, path: str, since: str) -> None:
        """``path`` is that of what is compared with the snapshot ``since``."""
        self._client = client
        self._path = path
        self._since = since
        self.data_bytes = 0
        self.zero_bytes = 0
        self.size_bytes = 0
        """Of what is compared; known from the first page on."""

    def ranges(self) -> Iterator[dict[str, Any]]:
        """Yield the ranges in order; raises Refused, Unreachable."""
        query: dict[str, Any] = {"since": self._since, "limit": API_MAX_CHANGES}
        offset_bytes: int | None = 0
        while offset_bytes is not None:
            page = self._client.call("GET", self._path, query={**query, "offset": offset_bytes})
            self.size_bytes = page["size_bytes"]
            for each in page["changes"]:
                if each["zero"]:
                    self.zero_bytes += each["length_bytes"]
                else:
                    self.data_bytes += each["length_bytes"]
                yield each
            offset_bytes = page.get("next_offset_bytes")


@click.command("diff")
@click.argument("old")
@click.argument("new", required=False)
@output_option
@pass_context
def diff(context: Context, old: str, new: str | None, output: str) -> None:
    """List the byte ranges that changed since the snapshot OLD: in the snapshot NEW, or in a volume as it is now.

    Without NEW that is OLD's own volume. NEW may be younger or older, of the same volume, or of a clone or its origin.
    A range is 'data' or 'zero'; what is not listed is the same in both. Of a volume in use a long list is of several
    moments: take a snapshot for one.
    """
    client = context.client
    if new is None:
        new = old.partition("@")[0] if "@" in old else client.call("GET", f"/v1/snapshots/{segment(old)}")["volume_id"]
    kind = "snapshots" if "@" in new else "volumes"
    changes = Changes(client, f"/v1/{kind}/{segment(new)}/changes", old)
    ranges = changes.ranges()
    first = next(ranges, None)  # a refusal comes before anything is printed
    with whole_output():
        if output == "json":
            _print_json(changes, first, ranges)
            return
        line = "{:d},{:d},{}" if output == "csv" else "{:>20d}  {:>20d}  {}"
        header = "offset_bytes,length_bytes,kind" if output == "csv" else f"{'OFFSET':>20}  {'LENGTH':>20}  KIND"
        print(header)  # not click.echo: that would flush every line
        for each in _all(first, ranges):
            print(line.format(each["offset_bytes"], each["length_bytes"], "zero" if each["zero"] else "data"))
        if output == "table":
            data, zero = size_for_people(changes.data_bytes), size_for_people(changes.zero_bytes)
            print(f"{data} of data and {zero} of zeros, of {size_for_people(changes.size_bytes)}")


def _all(first: dict[str, Any] | None, rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    if first is not None:
        yield first
    yield from rest


def _print_json(changes: Changes, first: dict[str, Any] | None, rest: Iterator[dict[str, Any]]) -> None:
    print('{"changes": [', end="")
    separator = "\n  "
    for each in _all(first, rest):
        print(separator + json.dumps(each), end="")
        separator = ",\n  "
    sums = {
        "data_bytes": changes.data_bytes,
        "zero_bytes": changes.zero_bytes,
        "size_bytes": changes.size_bytes,
    }
    print(f"\n], {json.dumps(sums)[1:]}")
