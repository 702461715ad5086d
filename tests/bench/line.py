"""A slow and distant line in user space: a TCP relay that lets bytes through at a rate, and late.

Each direction has one token bucket, shared by all connections as on a real line, and half of the round trip as its
delay; opening a connection costs a round trip. Neither loss nor TCP's own congestion control is imitated, so every
sender meets a line that is kinder than a real one.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Self

_CHUNK = 8192
_QUEUE = 0.05  # seconds of the line's rate that wait in its buffer
_SOCKET_BUFFER = 64 * 1024  # small, so that senders feel the line and not a buffer of ours


class _Direction:
    """One way over the line, with what went over it."""

    def __init__(self, bytes_per_second: float, delay: float) -> None:
        self._rate = bytes_per_second
        self._delay = delay
        self._free_at = 0.0
        self.reset()

    def reset(self) -> None:
        """Start counting anew; the bucket stays as it is, connections that are open go on using it."""
        self.bytes = 0
        self.first = self.last = 0.0  # time.monotonic() at which the first byte was sent, the last one arrived

    def send(self, count: int) -> tuple[float, float]:
        """Put bytes on the line: when they arrive, and how long its queue is then."""
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + count / self._rate
        self.bytes += count
        self.first = self.first or now
        self.last = self._free_at + self._delay
        return self.last, self._free_at - now


class Line:
    """`with Line("127.0.0.1", port, 24e6, 0.04) as line: … line.port …` leads to that port over such a line."""

    def __init__(self, target_host: str, target_port: int, bits_per_second: float, rtt_seconds: float) -> None:
        self._target = (target_host, target_port)
        self._rate = bits_per_second / 8
        self._rtt = rtt_seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        self.port: int = self._listener.getsockname()[1]
        self.up, self.down = (_Direction(self._rate, rtt_seconds / 2) for _ in range(2))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="line", daemon=True)

    def reset(self) -> None:
        """Start counting anew; connections may be open."""
        self.up.reset()
        self.down.reset()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._stopping = asyncio.Event()
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._listener, limit=_CHUNK)
        await self._stopping.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, here: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        there = None
        try:
            await asyncio.sleep(self._rtt)  # SYN and SYN-ACK
            answer, there = await asyncio.open_connection(*self._target, limit=_CHUNK)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(here, there, self.up))
                group.create_task(self._carry(answer, back, self.down))
        except* (OSError, asyncio.CancelledError):  # one side is gone, so is the other; or the line is taken down
            pass
        finally:
            for writer in filter(None, (back, there)):
                writer.close()

    @staticmethod
    async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: _Direction) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            while True:
                at, block = await under_way.get()
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                if not block:
                    writer.write_eof()
                    return
                writer.write(block)
                await writer.drain()

        async with asyncio.TaskGroup() as group:
            group.create_task(arrive())
            while block := await reader.read(_CHUNK):
                at, queue = way.send(len(block))
                under_way.put_nowait((at, block))
                await asyncio.sleep(max(0.0, queue - _QUEUE))
            under_way.put_nowait((way.last, b""))
