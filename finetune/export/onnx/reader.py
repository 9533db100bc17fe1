"""An exported ONNX folder, read and run by onnxruntime-genai: logits of given tokens, and greedy answers."""

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
    """A folder with genai_config.json, opened on the CPU.

    Raises: MissingExtra without onnxruntime-genai; IntegrityError where it cannot open or run the folder.
    """

    def __init__(self, folder: Path):
        self._genai = runtime()
        self.name = f"onnxruntime-genai {self._genai.__version__}"
        self._folder = folder
        self._model: Any = self._try(lambda: self._genai.Model(str(folder)))
        self._tokenizer: Any = None

    def logits(self, ids: Sequence[int]) -> Tensor:
        """ids [T] -> logits [T, V] in fp32, from one pass over all of them."""
        return self._try(lambda: self._logits(ids))

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy answer to a prompt, token by token from the cache: new ids alone, a stop token included."""
        return self._try(lambda: self._generate(ids, max_new_tokens))

    def encode(self, text: str) -> list[int]:
        """Ids as onnxruntime-genai's own tokenizer has them; control tokens in the text count as such.

        It leaves out the tokenizer's Unicode normalization (NFC): give it composed text, as keyboards write it.
        """
        if self._tokenizer is None:
            self._tokenizer = self._try(lambda: self._genai.Tokenizer(self._model))
        return self._try(lambda: self._tokenizer.encode(text).tolist())

    def _logits(self, ids: Sequence[int]) -> Tensor:
        generator = self._started(ids, 1)
        # get_logits is the last token's alone; the graph's own output has them all, in the graph's precision.
        return torch.from_numpy(np.array(generator.get_output("logits"), dtype=np.float32))[0]

    def _generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        generator = self._started(ids, max_new_tokens)
        new: list[int] = []
        while len(new) < max_new_tokens and not generator.is_done():
            generator.generate_next_token()
            # The generator's own sequence leaves out the stop token.
            new.append(int(generator.get_next_tokens()[0]))
        return new

    def _started(self, ids: Sequence[int], more: int) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        # What genai_config.json asks for is for chatting; a proof needs the plain arg max.
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
        except RuntimeError as error:  # all that the library raises
            raise IntegrityError(f"{self._folder}: {self.name} cannot run it: {error}") from error


def generate(folder: Path, ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy answer of an exported folder: new ids, a stop token included. For many prompts open one OnnxModel.

    Raises: as OnnxModel.
    """
    return OnnxModel(folder).generate(ids, max_new_tokens)
