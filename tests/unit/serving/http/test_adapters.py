"""Adapters that come and go at a client's request, from one folder and by plain names only."""

from __future__ import annotations

import pytest

from finetune.models.adapters.folder import CONFIG_FILE, TENSOR_FILE
from finetune.system.errors import IntegrityError
from tests.unit.serving.http.test_bodies import ASK, CHAT, refused


@pytest.fixture
def folder(tmp_path):
    """Return a folder of adapters, with one in it, one outside, and a link to that one."""
    for place in ("adapters/sailor", "elsewhere/secret"):
        (tmp_path / place).mkdir(parents=True)
        for file in (CONFIG_FILE, TENSOR_FILE):
            (tmp_path / place / file).write_bytes(b"{}")
    (tmp_path / "adapters/empty").mkdir()
    (tmp_path / "adapters/link").symlink_to(tmp_path / "elsewhere/secret")
    return tmp_path / "adapters"


@pytest.fixture
def served(serve, folder):
    return serve(allow_adapters=True, adapters_folder=str(folder))


def test_an_adapter_is_loaded_asked_and_unloaded(served):
    client = served.client
    assert client.post("/v1/adapters", json={"name": "sailor"}).json()["parent"] == "base"
    assert client.post("/v1/adapters", json={"name": "second", "folder": "sailor"}).is_success
    assert [model["id"] for model in client.get("/v1/models").json()["data"]][-2:] == ["sailor", "second"]
    assert client.post(CHAT, json=ASK | {"model": "second"}).json()["model"] == "second"
    assert served.engine.requests[0].adapter == "second"
    assert client.delete("/v1/adapters/second").json() == {"id": "second", "object": "model", "deleted": True}
    refused(client.post(CHAT, json=ASK | {"model": "second"}), 404)


def test_names_of_vllm_do_the_same(served, folder):
    client = served.client
    path = str(folder / "sailor")
    for given in (path, "sailor"):
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "sailor", "lora_path": given}).is_success
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "sailor"}).is_success
    assert served.engine.adapters() == ["pirate"]


@pytest.mark.parametrize(
    "name", ["..", "../elsewhere/secret", "/etc", "a/b", "a\\b", "link", ".", "a\0b", "sailor/.", "é" * 200]
)
def test_a_folder_elsewhere_is_refused(served, folder, name):
    refused(served.client.post("/v1/adapters", json={"name": "x", "folder": name}), 403)
    refused(served.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": name}), 403)
    outside = str(folder.parent / "elsewhere/secret")
    refused(served.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": outside}), 403)
    assert served.engine.adapters() == ["pirate"]


def differs(name, folder):
    raise IntegrityError("KL=1.2")


def test_what_cannot_be_loaded(served):
    client = served.client
    refused(client.post("/v1/adapters", json={"name": "missing"}), 404)
    error = refused(client.post("/v1/adapters", json={"name": "empty"}))
    assert "empty" in error["message"] and "/adapters" not in error["message"]
    refused(client.post("/v1/adapters", json={"name": "pirate", "folder": "sailor"}), 409)
    refused(client.post("/v1/adapters", json={"name": "../x"}))
    served.service._check = differs
    error = refused(client.post("/v1/adapters", json={"name": "far", "folder": "sailor"}))
    assert "KL=1.2" in error["message"]
    refused(client.delete("/v1/adapters/missing"), 404)
    refused(client.delete("/v1/adapters/base"))
    assert set(served.service.models) == {"base", "pirate"}


@pytest.mark.parametrize("options", [{}, {"adapters_folder": "."}, {"allow_adapters": True}])
def test_nothing_is_loaded_unless_both_settings_allow_it(serve, options):
    client = serve(**options).client
    refused(client.post("/v1/adapters", json={"name": "tests"}), 403)
    refused(client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "tests"}), 403)
    if "allow_adapters" not in options:
        refused(client.delete("/v1/adapters/pirate"), 403)
        refused(client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"}), 403)
