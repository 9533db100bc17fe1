"""Documents for training and evaluation: pieces of stored rows, built on access."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import overload

import numpy as np

from finetune.config.schema import DataConfig, RunConfig
from finetune.data.encoded import IGNORE_INDEX, Encoded, Prompt
from finetune.data.media.media import Media
from finetune.data.positions import PlacedMedia
from finetune.data.tokens.store import TokenStore


@dataclass(frozen=True, slots=True)
class Judged:
    """What a run knows of an answer that its model sampled.

    log_probs: [N] float32, of the document's targets when they were sampled.
    advantage: how much better the answer is than others to the same prompt.
    """

    log_probs: np.ndarray
    advantage: float


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens and labels of one row, or of a piece of it.

    ids: [T] int32.
    labels: [T] int32, already shifted: labels[t] is the token to predict from position t, or IGNORE_INDEX.
    location: `file:line`, for messages to the user.
    weights: [T] float32, factor of the loss at each position; None is 1 everywhere.
    row: index in its source, from 0.
    student_generated: the model in training wrote the targets, so only a teacher can judge them.
    placed: the images, audio and video behind placeholder tokens; None for text. Documents with equal ids and
        different media have different hidden states.
    chosen_tokens: as in `Encoded`; None for a document that is one text.
    judged: of a sampled answer in reinforcement learning.
    """

    ids: np.ndarray
    labels: np.ndarray
    location: str
    weights: np.ndarray | None = None
    row: int = 0
    student_generated: bool = False
    placed: PlacedMedia | None = None
    chosen_tokens: int | None = None
    judged: Judged | None = None

    @property
    def first_target(self) -> int:
        """The position that predicts the first target: the last token of the prompt."""
        return int(np.flatnonzero(self.labels != IGNORE_INDEX)[0])

    def prompt(self, tokens: int | None = None) -> Prompt:
        """Return the first tokens, up to the first target if no number is given."""
        part = self.cut(slice(0, self.first_target + 1 if tokens is None else tokens))
        return Prompt(part.ids, part.placed)

    @property
    def target_tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def media(self) -> tuple[Media, ...]:
        """Its images, audio and video, in the order of the tokens."""
        return () if self.placed is None else self.placed.items

    @property
    def media_digest(self) -> bytes:
        """Hash of its images, audio and video; empty for text."""
        return b"" if self.placed is None else self.placed.digest

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, part: slice) -> Document:
        """Return a part of the tokens, with the media in it. Raises: ValueError if that cuts through media."""
        placed = None if self.placed is None else self.placed.within(part.start, part.stop)
        weights = None if self.weights is None else self.weights[part]
        return replace(self, ids=self.ids[part], labels=self.labels[part], weights=weights, placed=placed)

    @property
    def sides(self) -> tuple[Document | None, Document | None]:
        """The desirable and the undesirable answer of a row with preferences, each with its prompt."""
        if self.chosen_tokens is None:
            raise ValueError(f"{self.location}: the row has no preference")
        return self._side(slice(0, self.chosen_tokens)), self._side(slice(self.chosen_tokens, len(self)))

    def _side(self, part: slice) -> Document | None:
        if part.start >= part.stop:
            return None
        return replace(self.cut(part), chosen_tokens=None)


@dataclass(frozen=True)
class Documents(Sequence[Document]):
    """Documents of one or several stores. All arrays are [M] int64.

    stores: hold the tokens.
    source: index of each document's store.
    rows: its row in that store.
    starts, lengths: its piece of that row, in tokens.
    targets: its number of targets.
    """

    stores: tuple[TokenStore, ...]
    source: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Document: ...
    @overload
    def __getitem__(self, i: slice) -> Documents: ...
    def __getitem__(self, i: int | slice) -> Document | Documents:
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        store, row, piece = self.piece(i)
        # Position t predicts token t + 1, and the last position predicts nothing.
        weights = np.append(piece.weights[1:], np.float32(0))
        labels = np.full(len(piece.ids), IGNORE_INDEX, dtype=np.int32)
        labels[:-1] = np.where(weights[:-1] > 0, piece.ids[1:], IGNORE_INDEX)
        return Document(
            piece.ids,
            labels,
            store.location(row),
            None if np.isin(weights, (0, 1)).all() else weights,
            row=int(store.indices[row]),
            placed=piece.placed,
            chosen_tokens=piece.chosen_tokens,
        )

    def piece(self, i: int) -> tuple[TokenStore, int, Encoded]:
        """Return the store of a document, its row there, and its tokens."""
        store, row = self.stores[self.source[i]], int(self.rows[i])
        return store, row, store.piece(row, int(self.starts[i]), int(self.lengths[i]))

    @property
    def prompt_lengths(self) -> np.ndarray:
        """The tokens [M] without the targets: of a prompt, whose answer is the target."""
        return self.lengths - self.targets

    def select(self, which: np.ndarray) -> Documents:
        """Return the documents with these indices, or where this mask is true."""
        arrays = (self.source, self.rows, self.starts, self.lengths, self.targets)
        return Documents(self.stores, *(array[which] for array in arrays))

    @staticmethod
    def join(parts: Iterable[Documents]) -> Documents:
        """Concatenate documents."""
        stores: list[TokenStore] = []
        columns = []
        for part in parts:
            columns.append((part.source + len(stores), part.rows, part.starts, part.lengths, part.targets))
            stores += part.stores
        return Documents(tuple(stores), *map(np.concatenate, zip(*columns, strict=True)))

    def media(self) -> Iterator[Media]:
        """Yield the images, audio and videos of the documents, in their order."""
        return chain.from_iterable(self.media_of_each())

    def media_of_each(self) -> Iterator[tuple[Media, ...]]:
        """Yield the images, audio and videos of each document."""
        for source, row in zip(self.source.tolist(), self.rows.tolist(), strict=True):
            placed = self.stores[source].placed(row)
            yield () if placed is None else placed.items

    def digest(self) -> str:
        """Return the SHA-256 of tokens, loss weights and order; names and places of files do not count."""
        digest = hashlib.sha256()
        for store in self.stores:
            digest.update(store.meta.content.encode())
        for array in (self.source, self.rows, self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).data)
        return digest.hexdigest()


def leave_room(documents: Documents, cfg: RunConfig) -> np.ndarray:
    """Return which prompts [M] leave room for an answer of `reward.max_new_tokens`; all do in a run without rewards."""
    room = cfg.data.max_length - (0 if cfg.reward.loss == "none" else cfg.reward.max_new_tokens)
    return documents.prompt_lengths <= room


@dataclass(frozen=True)
class Cut:
    """A store's documents after `data.max_length`.

    too_long, without_target, with_media: row indices. Rows with media are never cut: those too long are left out.
    """

    documents: Documents
    counts: Counter[str]
    too_long: np.ndarray
    without_target: np.ndarray
    with_media: np.ndarray


def cut_to_length(store: TokenStore, rows: np.ndarray, cfg: DataConfig) -> Cut:
    """Return the rows' documents, cut to `data.max_length` by `data.truncation`."""
    limit = cfg.max_length
    short = rows[store.lengths[rows] <= limit]
    too_long = rows[store.lengths[rows] > limit]
    with_media = too_long[store.has_media[too_long]]
    cuttable = too_long[~store.has_media[too_long]]
    # Columns: row, start, length, targets.
    whole = np.stack([short, np.zeros_like(short), store.lengths[short], store.targets[short]], axis=1)
    pieces: list[tuple[int, int, int, int]] = []
    for row, length in zip(cuttable.tolist(), store.lengths[cuttable].tolist(), strict=True):
        starts = {"left": [length - limit], "right": [0], "split": range(0, length, limit)}.get(cfg.truncation, [])
        cuts = [(row, start, min(limit, length - start)) for start in starts]
        pieces += [(*piece, store.piece(*piece).targets) for piece in cuts]
    cut = np.array(pieces, dtype=np.int64).reshape(-1, 4)
    kept = cut[cut[:, 3] > 0]
    used = np.concatenate([whole, kept])
    used = used[np.argsort(used[:, 0], kind="stable")]
    documents = Documents((store,), np.zeros(len(used), dtype=np.int64), *used.T.copy())
    counts = Counter({f"longer than {limit} tokens ({cfg.truncation})": len(cuttable)} if len(cuttable) else {})
    if len(with_media):
        counts[f"longer than {limit} tokens (left out: media are never cut)"] = len(with_media)
    lost = np.setdiff1d(np.unique(cut[:, 0]), kept[:, 0])
    if silent := len(cut) - len(kept) - len(lost):
        counts["pieces without a target left out"] = silent
    return Cut(documents, counts, too_long, lost, with_media)


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` indices below `count`, with the first and the last."""
    if wanted >= count:
        return list(range(count))
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]
