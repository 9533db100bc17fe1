"""An engine without a model, for tests of what lies between it and a client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from finetune.serving.request import Finished, Load, PromptScores, Put, Request, Token, TokenScore
from finetune.system.errors import InputError


class ScriptedEngine:
    """Answers what `reply` returns for a request; without one the prompt's own tokens, from the first on.

    Each token takes `seconds`, all answers together. requests: all that came. cancelled: their handles.
    """

    context_tokens = 4096

    def __init__(self, reply: Callable[[Request], Sequence[int]] | None = None, seconds: float = 0.0):
        self._reply = reply or (lambda request: request.ids)
        self._seconds = seconds
        self.folders: dict[str, str] = {}
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self._new: SimpleQueue[tuple[int, Request, Put] | None] = SimpleQueue()
        self._running: dict[int, tuple[Request, Put, list[int]]] = {}
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: Request, put: Put) -> int:
        if request.adapter is not None and request.adapter not in self.folders:
            raise InputError(f"the adapter {request.adapter!r} is not loaded")
        self.requests.append(request)
        self._new.put((len(self.requests), request, put))
        return len(self.requests)

    def cancel(self, handle: Any) -> None:
        self.cancelled.append(handle)

    def load(self) -> Load:
        return Load(running=len(self._running), waiting=self._new.qsize())

    def adapters(self) -> list[str]:
        return list(self.folders)

    def load_adapter(self, name: str, folder: str) -> None:
        self.folders[name] = folder

    def unload_adapter(self, name: str) -> None:
        if name not in self.folders:
            raise InputError(f"the adapter {name!r} is not loaded")
        del self.folders[name]

    def close(self) -> None:
        self._new.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            while not self._new.empty() or not self._running:
                new = self._new.get()
                if new is None:
                    for _, put, _ in self._running.values():
                        put(Finished("cancelled"))
                    return
                handle, request, put = new
                self._running[handle] = (request, put, list(self._reply(request))[: request.max_tokens])
                if request.prompt_log_probs is not None:
                    scores = [TokenScore(token, -0.5) for token in request.ids]
                    put(PromptScores([None, *scores[1:]], [()] + [(score,) for score in scores[1:]]))
            time.sleep(self._seconds)
            for handle, (request, put, rest) in list(self._running.items()):
                if handle in self.cancelled:
                    put(Finished("cancelled"))
                    del self._running[handle]
                elif rest and rest[0] not in request.stop_ids:
                    scored = request.log_probs is not None
                    put(Token(rest.pop(0), -0.5 if scored else None))
                else:
                    put(Finished("stop" if rest else "length"))
                    del self._running[handle]
