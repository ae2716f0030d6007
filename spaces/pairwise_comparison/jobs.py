"""The turns of computations. A line runs one computation at a time. A job takes its turns in a line, and ends when its
time is up or when nobody waits for its result any more.

The page itself waits in no line. Each kind of job has its own places, so many tables do not block comparisons. A table
takes a new turn after every few pairs, so a comparison can come between.
"""

import asyncio
import time
from contextlib import asynccontextmanager
from contextvars import ContextVar

import guard
from anyio import to_thread


ALONE_SECONDS = 5  # that a client may be away
current: ContextVar["Job | None"] = ContextVar("current", default=None)


class Stopped(ValueError):
    """A job ended before it was done."""


class Kind:
    """
    Args:
        name: The name of the jobs in a sentence.
        places: Largest number that run or wait.
        seconds: Longest computation of a job.
    """

    def __init__(self, name: str, places: int, seconds: float):
        self.name, self.places, self.seconds = name, places, seconds
        self.taken = 0

    @asynccontextmanager
    async def job(self, session: str | None):
        if self.taken >= self.places:
            raise ValueError(f"{self.taken} {self.name} wait already, and this page takes no more. Try again later.")
        self.taken += 1
        try:
            yield Job(session, self.seconds)
        finally:
            self.taken -= 1


class Job:
    """
    Args:
        session: The session whose client must be there; `None` for a job of the page itself.
        seconds: Longest computation.
    """

    def __init__(self, session: str | None, seconds: float):
        self.session, self.seconds = session, seconds
        self.spent, self.began, self.alone_since = 0.0, None, None

    def check(self) -> None:
        """
        Raises:
            [`Stopped`]: the time is up, or the client has left.
        """
        now = time.monotonic()
        if self.session is not None and not guard.listening(self.session):
            self.alone_since = self.alone_since or now
            if now - self.alone_since > ALONE_SECONDS:
                raise Stopped("Nobody waits for this result any more. (A client reads the stream of its own session.)")
        else:
            self.alone_since = None
        if self.began is not None and self.spent + now - self.began > self.seconds:
            raise Stopped(
                f"This took more than {self.seconds:g} seconds, which is what one visitor gets. Shorten the texts, or "
                "choose a smaller model."
            )

    async def run(self, line: asyncio.Lock, task, *arguments):
        """Runs a function in a thread when it is this job's turn in a line."""
        while self.session is not None and not guard.listening(self.session):  # nobody waits, so nothing is computed
            self.check()
            await asyncio.sleep(0.05)
        turn = asyncio.ensure_future(line.acquire())
        try:
            while not (await asyncio.wait([turn], timeout=1))[0]:
                self.check()
        except BaseException:
            turn.cancel()
            turn.add_done_callback(lambda done: None if done.cancelled() else line.release())
            raise
        self.began = time.monotonic()
        token = current.set(self)
        try:
            self.check()
            return await to_thread.run_sync(task, *arguments)
        finally:
            current.reset(token)
            self.spent += time.monotonic() - self.began
            self.began = None
            line.release()


def check() -> None:
    """Checks the job that this code runs for, if there is one."""
    job = current.get()
    if job is not None:
        job.check()
