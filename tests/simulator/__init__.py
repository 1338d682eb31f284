"""A faithful local OpenRouter over real HTTP.

with Simulator() as sim:
    sim.script(replies.text("Hello."))
    ...  # a client talks to sim.base_url with sim.api_key
    assert sim.posts[0].body["stream"] is True
"""

from . import replies
from .framing import FRAMINGS, framing
from .ledger import Entry
from .runner import Remote, Simulator
from .scenarios import SCENARIOS, scenario, variants

__all__ = [
    "FRAMINGS",
    "SCENARIOS",
    "Entry",
    "Remote",
    "Simulator",
    "framing",
    "replies",
    "scenario",
    "variants",
]
