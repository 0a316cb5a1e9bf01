"""Generation: requests in, tokens and text out. Start with engine.py; `step` is the whole story."""

from dsv4.engine.engine import Engine, Events
from dsv4.engine.session import Session
from dsv4.engine.types import Completion, Event, Logprob, SamplingParams

__all__ = ["Completion", "Engine", "Event", "Events", "Logprob", "SamplingParams", "Session"]
