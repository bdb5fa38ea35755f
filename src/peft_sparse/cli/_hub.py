"""Not to wait long for a Hub that cannot be reached.

`huggingface_hub` asks six times for each file, without a limit to the time that connecting may take, and a model or a
data set is several files: minutes until somebody without a network reads why. So while a command runs, connecting has
a limit, and when nothing was answered in three tries over two seconds only the cache is read from then on, as with
HF_HUB_OFFLINE=1. After a single answer, whatever its status, all is as ever: a slow network is no missing one.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

FAILURES, SECONDS = 3, 2


class _Line:
    """What is known of the connection; the clients of all threads share one."""

    def __init__(self) -> None:
        self.failures = 0
        self.since = 0.0  # the first one
        self.answered = False
        self.lock = threading.Lock()

    def watch(self, client: Any) -> Any:
        """A client of `huggingface_hub` (httpx) that tells this line how its requests end."""
        from huggingface_hub import constants
        from huggingface_hub.errors import OfflineModeIsEnabled

        send = client.send

        def watched(request: Any, **arguments: Any) -> Any:
            times = request.extensions.get("timeout") or {}
            limit = constants.HF_HUB_ETAG_TIMEOUT  # 10 seconds, or what the user has set
            request.extensions["timeout"] = times | {"connect": min(times.get("connect") or limit, limit)}
            try:
                response = send(request, **arguments)
            except OfflineModeIsEnabled:
                raise
            except Exception as error:
                self.failed(error)
                raise
            self.answered = True
            return response

        client.send = watched
        return client

    def failed(self, error: Exception) -> None:
        """Count, and give up if nothing was ever answered."""
        from huggingface_hub import constants

        with self.lock:
            self.failures += 1
            self.since = self.since or time.monotonic()
            soon = self.failures < FAILURES or time.monotonic() - self.since < SECONDS
            if soon or self.answered or constants.HF_HUB_OFFLINE:
                return
            _set_offline(True)
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(
            f"{constants.ENDPOINT} cannot be reached ({reason}); from here on only what was downloaded before is used",
            stacklevel=2,
        )


@contextlib.contextmanager
def no_long_wait() -> Iterator[None]:
    """While this holds, a Hub that cannot be reached is given up after a few seconds."""
    from huggingface_hub import constants, get_session, set_client_factory

    if constants.HF_HUB_OFFLINE:
        yield
        return
    line, client = _Line(), get_session()  # as huggingface_hub, or who uses it, makes it
    make, hooks = type(client), client.event_hooks
    settings = {"event_hooks": hooks, "follow_redirects": True, "timeout": None}
    set_client_factory(lambda: line.watch(make(**settings)))
    try:
        yield
    finally:
        set_client_factory(lambda: make(**settings))
        _set_offline(False)


def _set_offline(offline: bool) -> None:
    """HF_HUB_OFFLINE, in a process whose libraries have read it already."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = offline
