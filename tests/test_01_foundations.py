"""01 Foundations: JSON, text, secrets at rest."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin

KEY = "sk-or-v1-0123456789"


@pytest.fixture(autouse=True)
def master(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the key that Open WebUI would have."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "a master key")


# Ids and JSON --------------------------------------------------------------------------


def test_an_id_has_its_prefix_and_is_its_own() -> None:
    ids = {plugin.new_id("msg") for _ in range(1000)}

    assert len(ids) == 1000
    assert all(re.fullmatch(r"msg_[0-9a-f]{16}", id_) for id_ in ids)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ('{"a": [1, null]}', {"a": [1, None]}),
        (b'"\xc3\xa5"', "å"),
        ("7", 7),
        ("", None),
        ("{bad json", None),
        (b"\xff\xfe\xff", None),
        ("[" * 100_000, None),
    ],
)
def test_json_is_parsed_and_nonsense_is_none(given: Any, value: Any) -> None:
    assert plugin.parse_json(given) == value


@pytest.mark.parametrize("value", [None, 1, "x", True, [{}], ("a",)])
def test_what_is_no_object_is_an_empty_one(value: Any) -> None:
    assert plugin.as_object(value) == {}
    assert plugin.as_object({"a": 1}) == {"a": 1}


@pytest.mark.parametrize("value", [None, 1, "x", True, {"a": 1}, ("a",)])
def test_what_is_no_array_is_an_empty_one(value: Any) -> None:
    assert plugin.as_list(value) == []
    assert plugin.as_list([1]) == [1]


@pytest.mark.parametrize("value", [None, 1, b"x", True, ["a"], {"a": 1}])
def test_what_is_no_text_is_an_empty_one(value: Any) -> None:
    assert plugin.as_text(value) == ""
    assert plugin.as_text("a") == "a"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((n, n) for n in (1, 0.5, 0, -3)),
        *((v, None) for v in (True, "1", None, [], {}, 10**400)),
        *((float(v), None) for v in ("nan", "inf", "-inf")),
    ],
)
def test_true_and_text_are_no_numbers(value: Any, number: float | None) -> None:
    assert plugin.as_number(value) == number


# Text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ("plain \u2028 å 🌧", "plain \u2028 å 🌧"),
        ("\ud83c\udf27", "🌧"),
        ("a\ud83cb", "a\ufffdb"),
        ("\udf27", "\ufffd"),
        ("", ""),
    ],
)
def test_surrogates_are_joined_or_replaced(given: str, whole: str) -> None:
    assert plugin.whole_text(given) == whole
    assert plugin.whole_text(given).encode("utf-8", "strict") == whole.encode()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 second"),
        (0.4, "1 second"),
        (1, "1 second"),
        (5, "5 seconds"),
        (89, "89 seconds"),
        (90, "2 minutes"),
        (600, "10 minutes"),
        (3600, "60 minutes"),
        (5400, "2 hours"),
        (10_800, "3 hours"),
        (200_000, "56 hours"),
    ],
)
def test_waiting_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert plugin.seconds_in_words(seconds) == words


# Secrets -------------------------------------------------------------------------------


class Holder(BaseModel):
    """Something that holds a secret."""

    secret: plugin.Secret = plugin.Secret("")


def test_a_secret_is_sealed_when_it_is_validated() -> None:
    holder = Holder.model_validate({"secret": KEY})

    assert holder.secret.startswith("encrypted:")
    assert holder.secret.reveal() == KEY


def test_a_secret_is_shown_nowhere() -> None:
    holder = Holder.model_validate({"secret": KEY})
    shown = [repr(holder), str(holder), holder.model_dump(), holder.model_dump_json()]

    assert not [text for text in map(str, shown) if KEY in text]
    assert repr(plugin.Secret(KEY)) == "Secret(set)"
    assert repr(plugin.Secret("")) == "Secret(empty)"
    assert KEY not in json.dumps(Holder.model_json_schema())


def test_a_secret_goes_through_a_store_unchanged() -> None:
    first = Holder.model_validate({"secret": KEY})

    stored = json.loads(json.dumps(first.model_dump()))
    second = Holder.model_validate(stored)

    assert second.secret == first.secret
    assert second.secret.reveal() == KEY


def test_the_same_secret_never_looks_the_same() -> None:
    sealed = {plugin.Secret.seal(KEY) for _ in range(3)}

    assert len(sealed) == 3


@pytest.mark.parametrize(
    ("given", "plain"), [("", ""), (f"  {KEY}\n", KEY), ("ключ", "ключ")]
)
def test_spaces_around_a_secret_do_not_count(given: str, plain: str) -> None:
    secret = TypeAdapter(plugin.Secret).validate_python(given)

    assert secret.reveal() == plain


def test_without_a_master_key_a_secret_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WEBUI_SECRET_KEY")

    secret = plugin.Secret.seal(KEY)

    assert secret == KEY
    assert secret.reveal() == KEY
    assert KEY not in repr(secret)


@pytest.mark.parametrize("changed", ["another master key", ""])
def test_a_secret_of_another_master_key_is_an_error(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = plugin.Secret.seal(KEY)
    monkeypatch.setenv("WEBUI_SECRET_KEY", changed)

    with pytest.raises(ValueError, match="another WEBUI_SECRET_KEY") as caught:
        sealed.reveal()
    assert KEY not in str(caught.value)
    assert plugin.Secret.seal(sealed) == sealed


def test_a_tampered_secret_is_an_error() -> None:
    sealed = plugin.Secret.seal(KEY)

    with pytest.raises(ValueError, match="WEBUI_SECRET_KEY"):
        plugin.Secret(sealed[:-4] + "AAA=").reveal()
