"""The allocation API over HTTP: the only room that imports aiohttp."""
