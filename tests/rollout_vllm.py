"""A server that speaks the part of vLLM's API that samples answers with an adapter, over real HTTP.

Its model is transformers and PEFT's own, and it computes every token from the whole text: no kernel or cache of ours.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel


class RolloutVllm:
    """Use it as a context. actions: the paths of adapters that it was told to load, and the names to unload."""

    def __init__(self, base: PreTrainedModel, stop_ids: set[int], takes_adapters: bool = True):
        self.base, self.stop_ids, self.takes_adapters = base, stop_ids, takes_adapters
        self.adapters: dict[str, Path] = {}
        self.actions: list[tuple[str, dict[str, Any]]] = []
        self.bytes_received = 0
        self._model: PeftModel | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.vllm = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> RolloutVllm:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def change(self, action: str, body: dict[str, Any]) -> tuple[int, str]:
        self.actions.append((action, body))
        if not self.takes_adapters:
            return 404, "Not Found"
        name = body["lora_name"]
        if action == "unload_lora_adapter":
            del self.adapters[name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        self.adapters[name] = Path(body["lora_path"])
        if self._model is None:
            self._model = PeftModel.from_pretrained(self.base, body["lora_path"], adapter_name=name)
        else:
            self._model.load_adapter(body["lora_path"], adapter_name=name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    @torch.no_grad()
    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._model is not None
        self._model.set_adapter(question["model"])
        self._model.eval()
        generator = torch.Generator().manual_seed(question["seed"])
        choices = []
        for prompt in question["prompt"]:
            for _ in range(question["n"]):
                ids, scores = list(prompt), []
                while len(scores) < question["max_tokens"] and (not scores or ids[-1] not in self.stop_ids):
                    logits = self._model(input_ids=torch.tensor([ids])).logits[0, -1].float()
                    log_probs = (logits / question["temperature"]).log_softmax(-1)
                    ids.append(int(torch.multinomial(log_probs.exp(), 1, generator=generator)))
                    scores.append(log_probs[ids[-1]].item())
                written = ids[len(prompt) :]
                names = [f"token_id:{token}" for token in written]
                choices.append(
                    {
                        "prompt_token_ids": prompt,
                        "token_ids": written,
                        "logprobs": {
                            "tokens": names,
                            "token_logprobs": scores,
                            "top_logprobs": [{name: score} for name, score in zip(names, scores, strict=True)],
                        },
                    }
                )
        return {"choices": choices}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def vllm(self) -> RolloutVllm:
        return self.server.vllm  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "base"}]} if self.path == "/v1/models" else {}))

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.vllm.bytes_received += length
        body, action = json.loads(self.rfile.read(length)), self.path.removeprefix("/v1/")
        if action == "completions":
            self._send(200, json.dumps(self.vllm.answer(body)))
        else:
            self._send(*self.vllm.change(action, body))

    def _send(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""
