"""Run Open WebUI with the pipe installed, enabled and configured.

python -m tests.demo            until Ctrl-C
python -m tests.demo --check    one chat, then exit
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Generator
from pathlib import Path
from types import FrameType

from tests.server import ADMIN, JSON, Account, OpenWebUI
from tests.webui import PLUGIN

FUNCTION_ID = "openrouter"
MODEL = f"{FUNCTION_ID}.openai/gpt-5-mini"
SECONDS_A_PIECE = 0.06  # a few words: about as fast as a model
DATA_DIR = PLUGIN.parent.parent / ".demo"
NOT_SUGGESTED = {"Benchmark", "Stall"}  # for whoever works on the pipe

WEATHER = '''"""
title: Weather
description: The weather of a city, made up
"""


class Tools:
    def get_weather(self, city: str) -> str:
        """
        Say what the weather is in a city.
        :param city: The city's name
        """
        return f"In {city}: 12 degrees, light rain in the evening."
'''


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8080, help="or the next free one")
    parser.add_argument("--data", type=Path, default=DATA_DIR, help="kept between runs")
    parser.add_argument("--check", action="store_true", help="one chat, then exit")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    with upstream() as (valves, where):
        _say(f"Starting Open WebUI on {where} (about 15 seconds) ...")
        env = {
            "WEBUI_SECRET_KEY": secret(options.data),
            "BYPASS_MODEL_ACCESS_CONTROL": "true",
            "DEFAULT_MODELS": MODEL,
        }
        port = next_free(options.port)
        with OpenWebUI(env, port=port, data_dir=options.data) as webui:
            count = prepare(webui.admin, valves)
            _say(f"\n  {count} models at   {webui.url}")
            _say(f"  sign in with    {ADMIN['email']} / {ADMIN['password']}\n")
            if options.check:
                return check(webui.admin)
            _say("Ctrl-C stops it; .demo/ keeps its data.")
            signal.pause()
    return 0


@contextlib.contextmanager
def upstream() -> Generator[tuple[JSON, str]]:
    """Yield the valves for OpenRouter where there is a key, else for the simulator."""
    if key := os.environ.get("OPENROUTER_API_KEY"):
        yield {"API_KEY": key}, "OpenRouter itself"
        return
    from tests.simulator import Simulator

    with Simulator(pace=SECONDS_A_PIECE) as simulator:
        valves = {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
        yield valves, "the simulator (OPENROUTER_API_KEY is not set)"


def prepare(admin: Account, valves: JSON) -> int:
    """Install or update the pipe, set its valves, and return how many models it has."""
    source = PLUGIN.read_text("utf-8")
    installed = admin.functions().get(FUNCTION_ID)
    if installed is None:
        admin.install_function(FUNCTION_ID, source, "OpenRouter")
    else:
        admin.update_function(FUNCTION_ID, source, "OpenRouter")
        if not installed["is_active"]:
            admin.toggle_function(FUNCTION_ID)
    kept = admin.get_valves(FUNCTION_ID)
    kept.pop("BASE_URL", None)  # a simulator's of an earlier run
    admin.set_valves(FUNCTION_ID, kept | valves)
    admin.dismiss_news()
    if "BASE_URL" in valves:
        body = {"suggestions": suggestions()}
        admin.call("POST", "/api/v1/configs/suggestions", body)
        offer_weather(admin)
    return sum(name.startswith(f"{FUNCTION_ID}.") for name in admin.models())


def offer_weather(admin: Account) -> None:
    """Install a tool, and switch it on in chats with the model of the first page."""
    meta = {"description": "The weather of a city, made up"}
    tool = {"id": "weather", "name": "Weather", "content": WEATHER, "meta": meta}
    if "weather" not in {each["id"] for each in admin.call("GET", "/api/v1/tools/")}:
        admin.call("POST", "/api/v1/tools/create", tool)
    name = admin.models()[MODEL]["name"]
    admin.save_model(MODEL, name=name, meta={"toolIds": ["weather"]})


def suggestions() -> list[JSON]:
    """Return what the simulator shows best, as the page offers it."""
    try:
        persona = importlib.import_module("tests.simulator.persona")
    except ImportError:
        return []
    return [
        {"title": [each.prompt, each.shows.split(";")[0]], "content": each.prompt}
        for each in getattr(persona, "PROMPTS", ())
        if each.name not in NOT_SUGGESTED
    ]


def check(admin: Account) -> int:
    """Hold one chat and say how it went."""
    chat = admin.chat(MODEL, "Say hello in one sentence.", timeout_seconds=120)
    if chat.error or not chat.text:
        _say(f"FAILED: {chat.error or 'no answer'}")
        return 1
    _say(f"OK: {MODEL} answered {len(chat.text)} characters")
    return 0


def secret(data: Path) -> str:
    """Return the demo's own secret, made at the first run."""
    path = data / "secret"
    if not path.exists():
        data.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(32))
    return path.read_text()


def next_free(port: int) -> int:
    """Return the first port from here on that nobody listens on."""
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not _is_taken(probe, port):
                return port
        port += 1


def _is_taken(probe: socket.socket, port: int) -> bool:
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        return True
    return False


def _say(line: str) -> None:
    print(line, flush=True)


def _leave(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that everything started here is stopped."""
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
