"""The metadata room: record formats, the LMDB store, offline check. The only room that imports lmdb."""
