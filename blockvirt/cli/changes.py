"""``blockvirt snapshot diff``: what changed, printed as it comes: a large volume has millions of ranges."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import click

from blockvirt.cli.client import Client, segment
from blockvirt.cli.context import Context, pass_context
from blockvirt.cli.output import output_option, size_for_people, whole_output
from blockvirt.limits import API_MAX_CHANGES

# How each range is printed, and what stands for data and for zeros.
_JSON = '{"offset_bytes": %d, "length_bytes": %d, "zero": %s}', ("false", "true")
_CSV = "%d,%d,%s", ("data", "zero")
_TABLE = "%20d  %20d  %s", ("data", "zero")


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

    def pages(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the ranges in order, so many at a time; raises Refused, Unreachable."""
        query: dict[str, Any] = {"since": self._since, "limit": API_MAX_CHANGES}
        offset_bytes: int | None = 0
        while offset_bytes is not None:
            page = self._client.call("GET", self._path, query={**query, "offset": offset_bytes})
            self.size_bytes = page["size_bytes"]
            zero_bytes = sum([each["length_bytes"] for each in page["changes"] if each["zero"]])
            self.zero_bytes += zero_bytes
            self.data_bytes += sum([each["length_bytes"] for each in page["changes"]]) - zero_bytes
            yield page["changes"]
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
    pages = changes.pages()
    first = next(pages)  # a refusal comes before anything is printed
    with whole_output():
        if output == "json":
            _print_json(changes, chain([first], pages))
            return
        header = "offset_bytes,length_bytes,kind" if output == "csv" else f"{'OFFSET':>20}  {'LENGTH':>20}  KIND"
        print(header)
        for page in chain([first], pages):
            for line in _lines(page, *(_CSV if output == "csv" else _TABLE)):
                print(line)  # not click.echo: that would flush every line
        if output == "table":
            data, zero = size_for_people(changes.data_bytes), size_for_people(changes.zero_bytes)
            print(f"{data} of data and {zero} of zeros, of {size_for_people(changes.size_bytes)}")


def _lines(page: list[dict[str, Any]], line: str, kinds: tuple[str, str]) -> list[str]:
    return [line % (each["offset_bytes"], each["length_bytes"], kinds[each["zero"]]) for each in page]


def _print_json(changes: Changes, pages: Iterable[list[dict[str, Any]]]) -> None:
    print('{"changes": [', end="")
    separator = "\n  "
    for page in pages:
        if page:
            print(separator + ",\n  ".join(_lines(page, *_JSON)), end="")
            separator = ",\n  "
    sums = {
        "data_bytes": changes.data_bytes,
        "zero_bytes": changes.zero_bytes,
        "size_bytes": changes.size_bytes,
    }
    print(f"\n], {json.dumps(sums)[1:]}")
