"""What a service allows, and for how long it waits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kvx.runtime.rules import Option, Problem, Rule, count, flag, number, path, refuse, text, wrong_values

MOST_PORT = 65_535
DAY = 86_400
ORIGINS = Rule(
    "origins such as https://example.org, or *",
    lambda value: (
        isinstance(value, tuple) and all(one == "*" or one.startswith(("http://", "https://")) for one in value)
    ),
)
TEXTS = Rule("texts", lambda value: isinstance(value, tuple) and all(isinstance(one, str) and one for one in value))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """A service: where it listens, and its limits, all of which are on by default. Raises OptionError."""

    host: Annotated[str, Option(text(), "The address to listen at. 0.0.0.0 is every address of this machine.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Option(count(MOST_PORT, least=0), "The port to listen at. 0 takes one that is free.")] = 5000
    pivot: Annotated[
        tuple[str, ...],
        Option(
            TEXTS,
            "Translate through this language where no model has a pair of languages. May be repeated. The results say "
            "that they were made so.",
        ),
    ] = ()
    keys: Annotated[
        Path | None,
        Option(path(), "Answer only requests with an API key of this file. `kvx key` makes the keys."),
    ] = None
    cors: Annotated[
        tuple[str, ...],
        Option(
            ORIGINS, "Let the pages of this origin use the service from a browser; * is every origin. May be repeated."
        ),
    ] = ()
    proxies: Annotated[
        tuple[str, ...],
        Option(
            TEXTS,
            "Believe the address of the client that this proxy passes on, as X-Forwarded-For. An address or a network. "
            "May be repeated.",
            flags=("--proxy",),
        ),
    ] = ()
    body_bytes: Annotated[
        int, Option(count(2**30), "The largest body of a request, in KiB.", flags=("--body-kb",), unit=2**10)
    ] = 2**20
    characters: Annotated[int, Option(count(), "The most characters of all texts of a request.")] = 50_000
    texts: Annotated[int, Option(count(100_000), "The most texts of a request.")] = 1000
    tokens: Annotated[
        int | None,
        Option(count(), "The longest translation of a sentence, in tokens.", unset="the limit of each bundle"),
    ] = None
    beams: Annotated[
        int, Option(count(1000), "The most beams, samples or alternatives that a request may ask for.")
    ] = 16
    requests: Annotated[int, Option(count(100_000), "Requests that are worked on at a time.")] = 128
    client_requests: Annotated[
        int, Option(count(100_000), "Requests of one client's address that are worked on at a time. As many may wait.")
    ] = 64
    waiting: Annotated[
        int, Option(count(100_000, least=0), "Requests that may wait until others are over. One more is refused.")
    ] = 256
    patience: Annotated[
        float,
        Option(number(0, DAY), "Seconds that a request may wait before it is refused, with the time to come back."),
    ] = 5.0
    timeout: Annotated[
        float,
        Option(
            number(0, DAY, above=True), "Seconds that a request may take in all. What is not translated by then is cut."
        ),
    ] = 60.0
    connections: Annotated[int, Option(count(100_000), "Connections that may be open at a time.")] = 1000
    grace: Annotated[
        float, Option(number(0, DAY), "Seconds that requests get to finish when the service is told to end.")
    ] = 30.0
    log_texts: Annotated[bool, Option(flag(), "Also log the texts of requests, which are left out otherwise.")] = False
    quiet: Annotated[bool, Option(flag(), "Log no requests.")] = False

    def __post_init__(self) -> None:
        refuse(itertools.chain(wrong_values(self), self._contradictions()))

    def _contradictions(self) -> Iterator[Problem]:
        if self.log_texts and self.quiet:
            yield Problem("log_texts", "`log_texts` has no effect with `quiet`", "one of the two")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("127.0.0.1", "::1", "localhost")
