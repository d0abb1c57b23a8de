"""What NBD clients may name: a volume by its name, or a host's logical unit ('web1/lun0')."""

from collections.abc import Callable, Sequence

from blockvirt.device import BASE_ALLOCATION, Capabilities, ExportInfo, context_matches
from blockvirt.errors import NotFound
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.registry import VolumeRegistry
from blockvirt.volumes.views import Volume

MAX_LISTED = 1_000  # names in one answer to NBD_OPT_LIST: each is a reply of its own, and clients show them to people


class Exports:
    """Satisfies device.ExportDirectory for the whole pool (local mode: no masking)."""

    def __init__(
        self,
        catalogue: Catalogue,
        registry: VolumeRegistry,
        resolve_unit: Callable[[str], str],
        unit_exports: Callable[[], Sequence[str]],
    ) -> None:
        """``resolve_unit`` gives the volume id behind 'HOST/lunN'; ``unit_exports`` lists such names."""
        self._catalogue = catalogue
        self._registry = registry
        self._resolve_unit = resolve_unit
        self._unit_exports = unit_exports

    def names(self) -> Sequence[str]:
        """See ExportDirectory: volumes in the order of names, then units; the first MAX_LISTED of them."""
        return (*self._catalogue.names(MAX_LISTED), *self._unit_exports())[:MAX_LISTED]

    async def describe(self, name: str) -> ExportInfo:
        """See ExportDirectory."""
        volume = self._volume(name)
        return ExportInfo(
            # The same under all of its export names: sessions of one volume must know of one another.
            name=volume.name,
            description="",
            size_bytes=volume.size_bytes,
            block_bytes=volume.chunk_bytes,
            capabilities=Capabilities(),
        )

    def contexts(self, name: str, query: str) -> Sequence[str]:
        """See ExportDirectory."""
        self._volume(name)
        return [context for context in (BASE_ALLOCATION,) if context_matches(context, query)]

    async def open(self, name: str, session_id: str, contexts: Sequence[str] = ()) -> Handle:
        """See ExportDirectory."""
        return await self._registry.open(self._volume(name).id, session_id)

    def _volume(self, name: str) -> Volume:
        if not name:
            raise NotFound("no export was named", correction="name a volume: nbd+unix:///NAME?socket=...")
        return self._catalogue.get(self._resolve_unit(name) if "/" in name else name)
