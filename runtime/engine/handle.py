"""What somebody who has submitted a text holds: its tokens as they come, its translation, and a way to call it off."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from kvx.runtime.engine.reply import Event, Events, Reply
from kvx.runtime.translation import Translation


class Handle:
    """A text that was submitted. Any thread may use it. Iterating gives its events, from the first, each time; so does
    `async for`.
    """

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    @property
    def done(self) -> bool:
        """Whether the translation or an error is there."""
        return self._reply.done

    def cancel(self) -> None:
        """Ends it as far as it has come, at the next step. Its translation then has the reason "cancelled"."""
        self._reply.cancel()

    def result(self, timeout: float | None = None) -> Translation:
        """The translation, which is waited for, up to `timeout` seconds.

        Raises TimeoutError, InputError where the model gave numbers that are not finite, and what went wrong in
        decoding.
        """
        reply = self._reply
        with reply.changed:
            if not reply.changed.wait_for(lambda: reply.done, timeout):
                raise TimeoutError(f"There is no translation after {timeout} s.")
        return reply.translation()

    def add_done_callback(self, callback: Callable[[Handle], object]) -> None:
        """Has this called once it is done, at once if it is already, in any thread. It must be quick: a decode loop
        waits for it. What it raises is logged.
        """
        self._reply.when_done(lambda: callback(self))

    def __iter__(self) -> Iterator[Event]:
        """The tokens as they are decided, then the result. Raises what `result` raises."""
        events, reply = Events(self._reply), self._reply
        while not events.ended:
            with reply.changed:
                reply.changed.wait_for(events.has_more)
            yield from events.ready()

    async def wait(self) -> Translation:
        """The translation, for asyncio. Where the task is cancelled, so is the text. Raises what `result` raises."""
        reply, done, mailbox = self._reply, asyncio.Event(), _mailbox()
        reply.when_done(lambda: mailbox.wake(done))
        try:
            await done.wait()
        finally:
            reply.cancel()
        return reply.translation()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events, for asyncio. It cancels nothing where it is closed. Raises what `result` raises."""
        reply, changed, mailbox = self._reply, asyncio.Event(), _mailbox()
        events = Events(reply)
        reply.listen(lambda: mailbox.wake(changed))
        while not events.ended:
            await changed.wait()
            changed.clear()
            for event in events.ready():
                yield event


class _Mailbox:
    """Wakes those who wait in an event loop, from any thread: all who are due by the time that the loop looks at once,
    as waking it costs more than all else here.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._due: deque[asyncio.Event] = deque()
        self._called = False

    def wake(self, event: asyncio.Event) -> None:
        """Sets an event, soon. A loop that is closed needs it no more."""
        self._due.append(event)
        loop = self._loop()
        if not self._called and loop is not None:
            self._called = True
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._open)

    def _open(self) -> None:
        self._called = False  # before anything is taken: who comes later calls again
        while self._due:
            self._due.popleft().set()


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()


def _mailbox() -> _Mailbox:
    """That of the loop that runs."""
    loop = asyncio.get_running_loop()
    found = _mailboxes.get(loop)
    if found is None:
        found = _mailboxes[loop] = _Mailbox(loop)
    return found
