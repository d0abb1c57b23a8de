"""The command line: talks HTTP to the daemon; only ``serve`` and ``check`` work in process.

Client commands import neither pydantic nor aiohttp: a listing takes less than 100 ms.
"""
