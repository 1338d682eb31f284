"""Run the simulator by itself: `python -m tests.simulator --port 8900 --key ...`."""

from __future__ import annotations

import argparse
import asyncio
import signal

from .backend import API_KEY, MANAGEMENT_KEY, Backend, Settings
from .runner import serve


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulator", description=__doc__
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8900, help="0 takes a free one")
    parser.add_argument("--key", default=API_KEY, help="the accepted inference key")
    parser.add_argument("--management-key", default=MANAGEMENT_KEY)
    parser.add_argument(
        "--pace", type=float, default=0.025, help="seconds between words"
    )
    return parser.parse_args(given)


async def run(options: argparse.Namespace) -> None:
    """Serve until told to stop."""
    settings = Settings(options.key, options.management_key, pace=options.pace)
    server, runner = await serve(Backend(settings), options.host, options.port)
    over = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    port = runner.addresses[0][1]
    print(f"http://{options.host}:{port}/api/v1", flush=True)
    await over.wait()
    server.closing = True
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(run(parse_arguments()))
