"""The targets of the attack "codecs", by name."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.attacks import codecs_record_targets as stored
from tests.attacks import codecs_text_targets as text
from tests.attacks import codecs_wire_targets as wire


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads bytes."""

    check: Callable[[bytes], None]
    """Raises what breaks a promise."""
    examples: Callable[[], list[bytes]]
    """Inputs that go well, to begin with."""


TARGETS = {
    "handshake": Target(wire.handshake, wire.handshake_examples),
    "requests": Target(wire.requests, wire.request_examples),
    "stream": Target(wire.stream, wire.stream_examples),
    "record": Target(stored.record, stored.record_examples),
    "leaf": Target(stored.leaf, stored.leaf_examples),
    "frames": Target(stored.frames, stored.frame_examples),
    "header": Target(stored.header, stored.header_examples),
    "label": Target(stored.label, stored.label_examples),
    "body": Target(text.body, text.body_examples),
    "token": Target(text.token, text.token_examples),
    "size": Target(text.size, text.size_examples),
    "cron": Target(text.cron, text.cron_examples),
}
