"""Workers that can be killed: the real plugin on real stores, without a web server.

`python -m tests.durability FOLDER` reads `fork N` lines: each makes a process that
serves turns on the socket `FOLDER/N.sock`. Imports happen once, before the forks.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

JSON = dict[str, Any]


def load_plugin() -> types.ModuleType:
    """Return the plugin's module, loaded without the host's own loader."""
    from tests.webui import PLUGIN

    module = types.ModuleType("function_durable")
    sys.modules[module.__name__] = module
    exec(compile(PLUGIN.read_text("utf-8"), str(PLUGIN), "exec"), module.__dict__)
    return module


def turn_of(order: JSON) -> JSON:
    """Return the arguments of `pipe()` for an order."""
    return {
        "body": {
            "model": f"durable.{order['model']}",
            "messages": order["messages"],
            "stream": True,
        },
        "__user__": {"id": order["user"]},
        "__metadata__": {"chat_id": order["chat"], "message_id": order["chat"]},
    }


async def serve(plugin: types.ModuleType, path: Path) -> None:
    """Answer orders, one a connection, with the events of their turns."""
    pipe = plugin.Pipe()
    pipe.valves = plugin.Pipe.Valves(**json.loads(os.environ["VALVES"]))
    plugin.LOG.setLevel("WARNING")

    async def answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        order = json.loads(await reader.readline())
        with contextlib.suppress(ConnectionError):
            async for event in await pipe.pipe(**turn_of(order)):
                writer.write(json.dumps(event).encode() + b"\n")
                await writer.drain()
            writer.write(b'{"type": "end"}\n')
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, path, limit=2**22)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Fork a worker for every line that asks for one, until there are no more."""
    folder = Path(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is logged must not stand among our own lines
    plugin = load_plugin()
    for name in ("open_webui.internal.db", "open_webui.utils.redis"):
        importlib.import_module(name)  # before the forks, since it takes seconds
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", file=out)
    children: list[int] = []
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os.close(0)
            path = folder / f"{line.split()[1]}.sock"
            path.unlink(missing_ok=True)
            asyncio.run(serve(plugin, path))
        children.append(pid)
        print(pid, file=out)
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


if __name__ == "__main__":
    main()
