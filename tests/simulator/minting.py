"""Reasoning that only this simulator can have written, and the check of it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

SECRET = b"openrouter simulator"
FORMATS = {
    "openai": "openai-responses-v1",
    "x-ai": "xai-responses-v1",
    "meta": "meta-responses-v1",
    "anthropic": "anthropic-claude-v1",
    "google": "google-gemini-v1",
}
NATIVE = ("openai-responses-v1", "xai-responses-v1", "meta-responses-v1")


def author(model: str) -> str:
    """Name the author of a model id or alias."""
    return model.removeprefix("~").split("/", 1)[0]


def reasoning_format(model: str) -> str:
    """Name the reasoning format that a model's family speaks."""
    return FORMATS.get(author(model), "unknown")


def _stamp(*parts: str) -> str:
    digest = hmac.new(SECRET, "\x1f".join(parts).encode(errors="replace"), "sha256")
    return base64.b64encode(digest.digest() * 2).decode()


def encrypt(model: str, nonce: str) -> str:
    """Mint an encrypted payload: `<provider blob>.<base64url JSON>`."""
    tag = json.dumps({"endpoint_slug": f"{model}|{author(model)}"}).encode()
    suffix = base64.urlsafe_b64encode(tag).decode()
    seal = _stamp("encrypted", reasoning_format(model), nonce, suffix)
    return f"gAAAA{nonce}{seal}.{suffix}"


def sign(model: str, text: str) -> str:
    """Mint a signature over a thought."""
    return _stamp(
        "signed", reasoning_format(model), hashlib.sha256(_raw(text)).hexdigest()
    )


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


NONCE = 24


def is_genuine(token: str, model: str) -> bool:
    """Tell whether an encrypted payload was minted for this model's family."""
    blob, _, suffix = token.partition(".")
    nonce = blob.removeprefix("gAAAA")[:NONCE]
    seal = _stamp("encrypted", reasoning_format(model), nonce, suffix)
    return blob == f"gAAAA{nonce}{seal}"


def reasoning_text(item: Mapping[str, Any]) -> str:
    """Join the visible thoughts of a reasoning item."""
    parts = item.get("content") or []
    return "".join(part.get("text") or "" for part in parts)


def integrity_fault(item: Mapping[str, Any], model: str) -> str | None:
    """Say what a provider dislikes about a replayed reasoning item, if anything."""
    encrypted, signature = item.get("encrypted_content"), item.get("signature")
    format_ = reasoning_format(model)
    if encrypted and not is_genuine(encrypted, model):
        return "encrypted"
    if signature and signature != sign(model, reasoning_text(item)):
        return "signature"
    if format_ in NATIVE and not encrypted:
        return "not_found"
    if format_ == "anthropic-claude-v1" and not (signature or encrypted):
        return "signature"
    return None
