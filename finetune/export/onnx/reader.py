"""Run an exported ONNX folder in onnxruntime-genai: logits of given tokens, and greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from finetune.export.onnx.builder import runtime
from finetune.system.errors import IntegrityError

T = TypeVar("T")


class OnnxModel:
    """An ONNX folder, opened on the CPU.

    Raises:
        MissingExtra: onnxruntime-genai is missing.
        IntegrityError: onnxruntime-genai cannot open or run the folder.
    """

    def __init__(self, folder: Path):
        self._genai = runtime()
        self.name = f"onnxruntime-genai {self._genai.__version__}"
        self._folder = folder
        self._model: Any = self._try(lambda: self._genai.Model(str(folder)))
        self._tokenizer: Any = None

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return fp32 logits [T, V] of ids [T], from one pass."""
        return self._try(lambda: self._logits(ids))

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the new ids of a greedy answer, generated with the cache; a stop token is included."""
        return self._try(lambda: self._generate(ids, max_new_tokens))

    def encode(self, text: str) -> list[int]:
        """Return the ids by onnxruntime-genai's tokenizer; control tokens in the text become control tokens.

        That tokenizer does not normalize Unicode: give it text in NFC.
        """
        if self._tokenizer is None:
            self._tokenizer = self._try(lambda: self._genai.Tokenizer(self._model))
        return self._try(lambda: self._tokenizer.encode(text).tolist())

    def _logits(self, ids: Sequence[int]) -> Tensor:
        generator = self._started(ids, 1)
        # get_logits returns the last token's only; the graph's output has all, in the graph's precision.
        return torch.from_numpy(np.array(generator.get_output("logits"), dtype=np.float32))[0]

    def _generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        generator = self._started(ids, max_new_tokens)
        new: list[int] = []
        while len(new) < max_new_tokens and not generator.is_done():
            generator.generate_next_token()
            # The generator's own sequence omits the stop token.
            new.append(int(generator.get_next_tokens()[0]))
        return new

    def _started(self, ids: Sequence[int], more: int) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        # The sampling of genai_config.json is for chats; a comparison needs the arg max.
        parameters.set_search_options(
            do_sample=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            min_length=0,
            max_length=len(ids) + more,
        )
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        return generator

    def _try(self, run: Callable[[], T]) -> T:
        try:
            return run()
        except RuntimeError as error:  # The library raises no other error.
            raise IntegrityError(f"{self._folder}: {self.name} cannot run it, found {error}") from error
