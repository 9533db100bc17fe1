"""Encode rows as tokens and loss weights, in this process or in child processes, without torch.

The children are plain processes that exchange pickles over pipes, not `multiprocessing`. So no process with a GPU and
threads is forked, and the user's script or notebook is not imported again. A child whose parent died reads the end of
its pipe and exits.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import local
from typing import IO, Any, cast

import numpy as np

from finetune.data.encoded import IGNORE_INDEX, Encoded
from finetune.data.formats.attachments import holds_files
from finetune.data.formats.messages import Conversation, Example, Preference, RawText, TokenRow, ToolCall
from finetune.data.formats.parser import PREFERENCE, VERDICTS, RowParser
from finetune.data.formats.preferences import EQUAL_SIDES, answer_alone, verdict_of
from finetune.data.media.processor import MediaProcessor
from finetune.data.sources.readers import RawBatch, Row
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.store import ROW, BadRow, EncodedBatch
from finetune.system.errors import DataError, FinetuneError, ResourceError

_PARENT = Path(__file__).resolve().parents[3]
_CHILD = f"import sys; sys.path.insert(0, {str(_PARENT)!r}); from finetune.data.tokens.encode import serve; serve()"
# Batches per worker: one in work, one waiting in its pipe.
_AHEAD = 2
# Part of every cache's fingerprint: raise it when the same rows give other tokens, weights or hashes.
ENCODING_VERSION = 3


@dataclass(frozen=True)
class RowEncoder:
    """Decodes, parses and encodes rows. Picklable, for worker processes.

    objective: as in `Preparation`; it decides which rows the run can learn from, and what of them are targets.
    media: reads the media of rows; None for a model that reads text only.
    """

    parser: RowParser
    chat: ChatTemplate
    train_on: str
    objective: str = "none"
    media: MediaProcessor | None = None

    def __call__(self, batch: RawBatch) -> EncodedBatch:
        """Encode a batch; rows that cannot be used are listed in it."""
        parsed = [(row, self._usable(row, example)) for row, example in self.parser.rows(batch)]
        conversations = [chat for _, example in parsed for chat in _conversations(example)]
        chats = self._encode_chats(conversations)
        texts = self._encode_texts([example.text for _, example in parsed if isinstance(example, RawText)])
        rows: list[tuple[int, ...]] = []
        good: list[Encoded] = []
        bad: list[BadRow] = []
        notes: Counter[str] = Counter()
        for row, example in parsed:
            match example:
                case Preference():
                    chosen, rejected = next(chats), next(chats)
                    encoded = chosen if self.objective == "answers" else _joined(chosen, rejected)
                case Conversation():
                    encoded = self._judged(next(chats), example)
                case RawText():
                    encoded = next(texts)
                case TokenRow():
                    encoded = self._encode_tokens(example)
                case DataError():
                    encoded = example
            if isinstance(encoded, DataError) or isinstance(example, DataError):
                bad.append(BadRow(row.index, row.location, str(encoded)))
                continue
            notes.update(
                note for chat in _conversations(example) for message in chat.messages for note in message.notes
            )
            content = _content(example)
            texts_of_row = () if isinstance(example, TokenRow) else _strings(content)
            control_tokens = sum(map(self.chat.control_tokens_in, texts_of_row))
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=dict)
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass") + encoded.media_digest, digest_size=8)
            hashed = int.from_bytes(digest.digest(), "little")
            rows.append((len(encoded.ids), encoded.targets, row.index, row.number, 0, control_tokens, hashed))
            good.append(encoded)
        none = [np.empty(0)]
        return EncodedBatch(
            file=batch.file,
            unit=batch.unit,
            rows=np.array(rows, ROW),
            ids=np.concatenate([encoded.ids for encoded in good] or none).astype(np.int32, copy=False),
            weights=np.concatenate([encoded.weights for encoded in good] or none).astype(np.float32, copy=False),
            placed=tuple(encoded.placed for encoded in good),
            chosen_tokens=tuple(encoded.chosen_tokens for encoded in good),
            bad=tuple(bad),
            bytes_read=batch.bytes_read,
            notes=notes,
            format=batch.format,
        )

    def _encode_chats(self, conversations: Sequence[Conversation]) -> Iterator[Encoded | DataError]:
        if self.objective == "reward":
            return map(self._encode_prompt, conversations)
        return iter(self.chat.encode(conversations, self.train_on, self.media))

    def _encode_prompt(self, conversation: Conversation) -> Encoded | DataError:
        """Lay out the prompt as a model gets it, then the row's answer; the answer and its end token are the targets.

        A row without an answer has the end token as its only target.
        """
        try:
            prompt = self.chat.prompt(conversation.prompt, conversation.tools, self.media)
            answer = self.chat.answer_text(conversation) if conversation.has_answer else ""
            [ids] = self.chat.encode_texts([answer])
        except DataError as error:
            return error
        if (end := self.chat.turn_end_id) is None:
            return DataError("the chat template has no control token that ends an answer")
        weights = np.repeat(np.array([0, 1], np.float32), [len(prompt.ids), len(ids) + 1])
        return Encoded(np.concatenate([prompt.ids, ids, [end]]).astype(np.int32), weights, prompt.placed)

    def _usable(self, row: Row, example: Example | DataError) -> Example | DataError:
        """Return the example, or why the model or the objective cannot use it."""
        if isinstance(example, DataError):
            return example
        if self.media is not None and isinstance(example, RawText) and holds_files(cast(dict, row.value)):
            return DataError(
                "rows of the format text hold no files, so the model would read the text alone; write rows with a "
                "prompt, or map columns: {prompt: …, completion: …}"
            )
        if self.objective == "reward" and not isinstance(example, Conversation):
            kind = "a pair of answers" if isinstance(example, Preference) else "text or tokens without turns"
            return DataError(f"reward.loss needs a prompt that ends with a user's turn; the row holds {kind}")
        if self.objective in ("none", "reward"):
            if isinstance(example, Preference):
                return DataError(PREFERENCE)
            if isinstance(example, Conversation) and example.verdict is False:
                return DataError("its label is false, which marks a bad answer; remove the row, or learn with kto")
            return example
        if isinstance(example, Preference):
            return example
        if self.objective == "answers":
            return self._good(example)
        if self.objective != "kto" or not isinstance(example, Conversation):
            wanted = "chosen and rejected answers" + (", or a label" if self.objective == "kto" else "")
            return DataError(f"preference.objective={self.objective} needs {wanted}; the row has none")
        if example.verdict is None:
            return DataError(f"preference.objective=kto needs {' or '.join(VERDICTS)}, or a rejected answer")
        try:
            return replace(answer_alone(example), verdict=verdict_of(example.verdict))
        except DataError as error:
            return error

    def _good(self, example: Example) -> Example | DataError:
        """Return an example to score a model on: its verdict, if it has one, must be good."""
        if not isinstance(example, Conversation) or example.verdict is None:
            return example
        try:
            if verdict_of(example.verdict):
                return replace(answer_alone(example), verdict=True)
        except DataError as error:
            return error
        return DataError("its label is false: a bad answer is no example of a good one")

    def _judged(self, encoded: Encoded | DataError, example: Conversation) -> Encoded | DataError:
        """Write the verdict of a row into its tokens, in a run that learns from verdicts."""
        if isinstance(encoded, DataError) or self.objective in ("none", "reward", "answers"):
            return encoded
        return _unweighted(replace(encoded, chosen_tokens=len(encoded.ids) if example.verdict else 0))

    def _encode_texts(self, texts: Sequence[str]) -> Iterator[Encoded | DataError]:
        """Every token is a target, and so is the end token after them."""
        for ids in self.chat.encode_texts(texts) if texts else ():
            if not len(ids):
                yield DataError("the text is empty")
                continue
            ids = np.concatenate([self.chat.text_start, ids, [self.chat.end_of_text_id]]).astype(np.int32)
            yield Encoded(ids, np.ones(len(ids), dtype=np.float32))

    def _encode_tokens(self, row: TokenRow) -> Encoded | DataError:
        if row.input_ids and max(row.input_ids) >= self.chat.vocabulary_size:
            return DataError(
                f"input_ids: the largest id of the tokenizer is {self.chat.vocabulary_size - 1}, found "
                f"{max(row.input_ids)}; was the row tokenized for another model?"
            )
        placeholders = () if self.media is None else self.media.placeholders.values()
        if held := [token for token in placeholders if self.chat.control_ids.get(token) in row.input_ids]:
            return DataError(f"input_ids hold {held[0]}, which stands for a file; a row of tokens has none")
        ids = np.asarray(row.input_ids, dtype=np.int32)
        trained = np.ones(len(ids), bool) if row.labels is None else np.asarray(row.labels) != IGNORE_INDEX
        if not trained[1:].any():
            return DataError("the row has no target: labels or masks leave out every token")
        return Encoded(ids, trained.astype(np.float32))


def _conversations(example: Example | DataError) -> tuple[Conversation, ...]:
    if isinstance(example, Preference):
        return example.chosen, example.rejected
    return (example,) if isinstance(example, Conversation) else ()


def _joined(chosen: Encoded | DataError, rejected: Encoded | DataError) -> Encoded | DataError:
    """Lay the tokens of both sides of a pair end to end."""
    if isinstance(chosen, DataError) or isinstance(rejected, DataError):
        return DataError(f"chosen: {chosen}" if isinstance(chosen, DataError) else f"rejected: {rejected}")
    if np.array_equal(chosen.ids, rejected.ids):
        return DataError(f"chosen and rejected {EQUAL_SIDES}")
    ids, weights = (np.concatenate([getattr(side, key) for side in (chosen, rejected)]) for key in ("ids", "weights"))
    placed = None
    if chosen.placed and rejected.placed:  # both have the prompt's
        placed = chosen.placed.joined(rejected.placed, len(chosen.ids))
    return _unweighted(Encoded(ids, weights, placed, len(chosen.ids)))


def _unweighted(encoded: Encoded) -> Encoded | DataError:
    """Refuse weights of tokens: a log-probability of an answer has none."""
    if np.isin(encoded.weights, (0, 1)).all():
        return encoded
    return DataError("weights other than 0 and 1 have no meaning for preferences; remove them")


def _content(example: Example) -> Any:
    """A row's texts, or tokens; spelling in the file and loss weights do not count."""
    if isinstance(example, Preference):
        return [_content(example.chosen), _content(example.rejected)]
    if isinstance(example, Conversation):
        turns = [
            (m.role, m.content, *map(ToolCall.as_dict, m.tool_calls), *((part.kind, part.offset) for part in m.media))
            for m in example.messages
        ]
        return [turns, example.tools]
    return example.text if isinstance(example, RawText) else example.input_ids


def _strings(value: Any) -> list[str]:
    """All texts in a value, keys too, in any order."""
    pending, texts = [value], []
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            pending += [*map(str, value), *value.values()]
        elif isinstance(value, list | tuple):
            pending += value
    return texts


def encode_all(encoder: RowEncoder, batches: Iterable[RawBatch], workers: int) -> Iterator[EncodedBatch]:
    """Encode batches in child processes, and yield them in order. Memory: two batches per worker.

    workers: number of processes; 0 encodes in this process.
    Raises: ResourceError if a worker dies.
    """
    if workers == 0:
        yield from map(encoder, batches)
        return
    children: list[_Child] = []
    mine = local()

    def encode(batch: RawBatch) -> EncodedBatch:
        if not hasattr(mine, "child"):
            mine.child = _Child(encoder)
            children.append(mine.child)
        return mine.child(batch)

    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as threads:
        try:
            pending: deque[Future[EncodedBatch]] = deque()
            for batch in batches:
                pending.append(threads.submit(encode, batch))
                if len(pending) >= _AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.stop()


class _Child:
    def __init__(self, encoder: RowEncoder):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._requests = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)
        self._send(encoder)

    def __call__(self, batch: RawBatch) -> EncodedBatch:
        try:
            self._send(batch)
            answer = pickle.load(self._answers)  # noqa: S301 - our own child's answer
        except (EOFError, BrokenPipeError) as error:
            code = self._process.wait()
            raise ResourceError(
                f"a tokenizing process died (exit code {code}); if memory is short, set data.workers=1"
            ) from error
        if isinstance(answer, FinetuneError):
            raise answer
        return answer

    def _send(self, message: RowEncoder | RawBatch) -> None:
        pickle.dump(message, self._requests, protocol=pickle.HIGHEST_PROTOCOL)
        self._requests.flush()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()


def serve() -> None:
    """Run a child: read an encoder, then answer each batch, until the parent closes the pipe."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), 1)  # keep prints out of the answers
    try:
        encoder: RowEncoder = pickle.load(requests)  # noqa: S301 - from the parent that started this process
        while True:
            batch = pickle.load(requests)  # noqa: S301
            try:
                answer: EncodedBatch | FinetuneError = encoder(batch)
            except FinetuneError as error:  # of the whole run, such as a library that is not installed
                answer = error
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError, KeyboardInterrupt, pickle.UnpicklingError):
        return  # the parent has ended, perhaps in the middle of a message
