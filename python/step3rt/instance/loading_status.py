"""Owns what is said while weights load: the session's status, and a line in the log now and then.

Never says so much that it costs time, nor so little that a slow load looks like a dead process.
"""

import logging
import time
from collections.abc import Callable

from step3rt import _core

logger = logging.getLogger(__name__)

REPEAT_S = 1.0
"""Between signs of life. The service manager waits two minutes for the next, and one layer of a
large model may take longer over a network."""

LOG_EVERY_S = 30.0


class LoadingStatus:
    """Says how far loading has come."""

    def __init__(
        self, session: _core.NodeSession, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Says nothing yet."""
        self._session = session
        self._clock_s = clock_s
        self._begin_s = self._logged_s = self._said_s = clock_s()
        self._said = ""

    def say(self, text: str) -> None:
        """Shows `text`, when it is new or the last sign of life is old; logs it if time is due."""
        now_s = self._clock_s()
        if text == self._said and now_s - self._said_s < REPEAT_S:
            return
        self._said, self._said_s = text, now_s
        self._session.set_status(text)
        if now_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = now_s
            logger.info("%s, for %.0f s now", text.capitalize(), now_s - self._begin_s)
