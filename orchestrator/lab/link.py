"""A device's cable where it has no network of its own: ``python -I -S link.py CONFIG``, a TCP relay.

CONFIG is JSON: ``port`` to listen on (0: any), ``backend`` port of the device, ``cut``, ``bytes_per_s`` or
null. It is read again at SIGHUP. Cut, the relay goes silent and keeps every connection, as a pulled cable
does; slow, all connections of a direction share the rate. It says ``here``, waits for a line (end of file: it
ends), listens and says ``ready PORT``. Uses the standard library only.
"""

import asyncio
import json
import os
import signal
import sys
import time
from typing import Any

_BLOCK_BYTES = 16 << 10
_HOST = "127.0.0.1"


class Direction:
    """One way of the cable: when the next byte may pass."""

    def __init__(self) -> None:
        self.free_at_s = 0.0


class Link:
    """The relay and its state."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        self.plugged = asyncio.Event()
        self.there, self.back = Direction(), Direction()

    def load(self) -> None:
        """Take the configuration as it is now."""
        with open(self.path) as stream:  # noqa: PTH123 - pathlib would cost start-up time
            self.config = json.load(stream)
        if self.config["cut"]:
            self.plugged.clear()
        else:
            self.plugged.set()

    async def carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        """Move bytes one way until their end; then tell the other side."""
        try:
            while data := await reader.read(_BLOCK_BYTES):
                await self.plugged.wait()
                rate = self.config["bytes_per_s"]
                if rate:
                    now = time.monotonic()
                    direction.free_at_s = max(now, direction.free_at_s) + len(data) / rate
                    await asyncio.sleep(direction.free_at_s - now)
                    await self.plugged.wait()
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:
            writer.close()  # one side is gone: so is the other

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection."""
        try:
            await self.plugged.wait()
            inner_reader, inner_writer = await asyncio.open_connection(_HOST, self.config["backend"])
        except OSError:
            writer.transport.abort()  # the device is off
            return
        await asyncio.gather(
            self.carry(reader, inner_writer, self.there), self.carry(inner_reader, writer, self.back)
        )
        for each in (writer, inner_writer):
            each.close()


def say(line: str) -> None:
    """A line to whoever started us."""
    os.write(1, f"{line}\n".encode())


async def main(path: str) -> int:
    """Listen until killed."""
    say("here")
    if not sys.stdin.readline():
        return 1
    link = Link(path)
    link.load()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, link.load)
    try:
        server = await asyncio.start_server(link.serve, _HOST, link.config["port"])
    except OSError as error:
        say(f"failed {error.strerror}")
        return 1
    say(f"ready {server.sockets[0].getsockname()[1]}")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(null, stream)
    async with server:
        await server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1])))
