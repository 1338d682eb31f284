"""The harness itself, with the smallest pipe there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server import Account, OpenWebUI, Refused, cluster_env

ECHO = '''"""
title: Echo
version: 1
"""

import asyncio

from pydantic import BaseModel


class Pipe:
    class Valves(BaseModel):
        GREETING: str = "You said"

    class UserValves(BaseModel):
        LOUD: bool = False

    def __init__(self):
        self.valves = self.Valves()

    async def pipes(self):
        return [{"id": "one", "name": "Echo one"}, {"id": "slow", "name": "Echo slow"}]

    async def pipe(self, body, __user__, __metadata__, __event_call__=None):
        text = body["messages"][-1]["content"]
        if text == "ask" and __event_call__:
            text = await __event_call__({"type": "input", "data": {"title": "?"}})
        if __user__["valves"].LOUD:
            text = text.upper()
        answer = f"{self.valves.GREETING}: {text} ({len(body['messages'])})"
        if not body.get("stream"):
            return answer
        return self._words(answer, body["model"].endswith("slow"))

    async def _words(self, answer, slow):
        for word in answer.split(" "):
            yield word + " "
            await asyncio.sleep(5 if slow else 0.01)
'''


@pytest.fixture(scope="module")
def echo(server: OpenWebUI) -> Iterator[Account]:
    server.admin.install_function("echo", ECHO, "Echo")
    yield server.admin
    server.admin.delete_function("echo")


def test_a_function_is_installed_and_its_models_are_listed(echo: Account) -> None:
    assert echo.functions()["echo"]["is_active"]
    assert {"echo.one", "echo.slow"} <= set(echo.models())


def test_a_chat_is_answered_stored_and_continued(echo: Account) -> None:
    first = echo.chat("echo.one", "hello")
    second = echo.chat("echo.one", "again", after=first)

    assert first.text == "You said: hello (1)"
    assert second.text == "You said: again (3)"
    assert second.id == first.id
    assert second.message["done"]
    assert not second.error


def test_an_answer_is_regenerated_beside_the_first(echo: Account) -> None:
    first = echo.chat("echo.one", "hello")

    second = echo.regenerate(first)

    assert second.message_id != first.message_id
    assert second.user_message_id == first.user_message_id
    assert len(second.messages) == 3


def test_an_answer_is_continued_in_place(echo: Account) -> None:
    first = echo.chat("echo.one", "hello")

    second = echo.continue_answer(first)

    assert second.message_id == first.message_id
    assert second.text.startswith(first.text)
    assert len(second.text) > len(first.text)


def test_a_temporary_chat_leaves_nothing_and_keeps_its_history(echo: Account) -> None:
    first = echo.chat("echo.one", "hello", temporary=True)
    assert first.text == "You said: hello (1)"

    with echo.listen() as tab:
        first = echo.chat("echo.one", "hello", temporary=True, listener=tab)
        second = echo.chat(
            "echo.one", "again", temporary=True, listener=tab, after=first
        )

    assert second.text == "You said: again (3)"
    with pytest.raises(Refused):
        echo.read_chat(first.id)


def test_a_tab_sees_events_in_order_and_answers_questions(echo: Account) -> None:
    with echo.listen() as tab:
        tab.answers["input"] = lambda data: f"to {data['title']}"
        chat = echo.chat("echo.one", "ask", session_id=tab.sid)
        tab.wait("chat:active")
        seen = tab.of(chat)

    assert chat.text == "You said: to ? (1)"
    assert [each.at for each in seen] == sorted(each.at for each in seen)
    assert any(each.type == "input" for each in seen)


def test_stop_keeps_what_was_said(echo: Account) -> None:
    with echo.listen() as tab:
        started = echo.start_chat("echo.slow", "hello", session_id=tab.sid)
        tab.wait(lambda seen: "You" in str(seen.data))
        echo.stop_chat(started)
        chat = echo.wait_chat(started, timeout_seconds=4)

    assert chat.text.strip() == "You"


@pytest.mark.parametrize("path", ["/api/chat/completions", "/api/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_api_client_is_answered(echo: Account, path: str, stream: bool) -> None:
    answer = echo.api_chat("echo.one", "hello", path=path, stream=stream)

    assert answer.status == 200
    assert answer.text.strip() == "You said: hello (1)"


def test_valves_act_on_the_next_call(echo: Account) -> None:
    echo.set_valves("echo", {"GREETING": "Echo"})
    echo.set_user_valves("echo", {"LOUD": True})

    chat = echo.chat("echo.one", "hello")

    assert chat.text == "Echo: HELLO (1)"
    assert echo.get_valves("echo") == {"GREETING": "Echo"}
    assert set(echo.valves_spec("echo")["properties"]) == {"GREETING"}
    assert set(echo.user_valves_spec("echo")["properties"]) == {"LOUD"}
    echo.set_valves("echo", {})
    echo.set_user_valves("echo", {})


def test_a_shared_model_is_another_users_too(server: OpenWebUI, echo: Account) -> None:
    user = server.add_user()
    assert "echo.one" not in user.models()

    echo.share_model("echo.one")

    assert "echo.one" in user.models()
    assert user.chat("echo.one", "hello").text == "You said: hello (1)"


def test_another_source_takes_over_at_once(echo: Account) -> None:
    echo.update_function("echo", ECHO.replace("You said", "You wrote"), "Echo")

    assert echo.chat("echo.one", "hello").text == "You wrote: hello (1)"

    echo.update_function("echo", ECHO, "Echo")


def test_a_file_is_uploaded_and_read_back(echo: Account) -> None:
    file = echo.upload("a.txt", b"hello", "text/plain")

    assert echo.download(f"/api/v1/files/{file['id']}/content") == b"hello"


def test_the_server_says_what_it_uses(server: OpenWebUI) -> None:
    footprint = server.footprint()

    assert footprint.cpu_seconds > 1
    assert footprint.rss_bytes > 50 * 2**20
    assert footprint.sockets >= 1
    assert server.connections_to(1) == 0


def test_a_refusal_says_why(echo: Account) -> None:
    with pytest.raises(Refused, match=r"400: .*alphanumeric"):
        echo.install_function("not-an-id", ECHO)


def test_workers_share_a_database_and_a_redis(
    postgres_url: str, redis_url: str
) -> None:
    with OpenWebUI(cluster_env(postgres_url, redis_url)) as server:
        server.admin.install_function("echo", ECHO)
        chats = [server.admin.chat("echo.one", "hello") for _ in range(6)]

        assert [chat.text for chat in chats] == ["You said: hello (1)"] * 6
        assert len(server.processes()) >= 4
        processes = server.processes()

    assert not any(process.is_running() for process in processes)
