"""OpenRouter for Open WebUI, in one file."""

from .open_webui_openrouter_pipe import Pipe as Pipe

__all__ = ["Pipe"]
