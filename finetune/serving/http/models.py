"""/v1/models and /v1/adapters: what is served, and adapters that come and go while it is."""

from __future__ import annotations

from pathlib import Path

from finetune.serving.http.errors import ApiError
from finetune.serving.http.replies import Deleted, Model, Models
from finetune.serving.service import ServedModel, Service
from finetune.system.errors import InputError, IntegrityError

_LONGEST_NAME_BYTES = 255  # of file systems


def model_of(service: Service, model: ServedModel) -> Model:
    """Return a model as /v1/models shows it."""
    base = next((each.name for each in service.models.values() if each.adapter is None), model.name)
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "finetune",
        "root": base,
        "parent": None if model.adapter is None else base,
        "max_model_len": service.engine.context_tokens,
        "details": dict(model.details),
    }


def all_models(service: Service) -> Models:
    """Return all models, the base first if it is served."""
    models = sorted(service.models.values(), key=lambda model: model.adapter is not None)
    return {"object": "list", "data": [model_of(service, model) for model in models]}


class Adapters:
    """Loads and unloads adapters at a client's request, from one folder and by plain names only."""

    def __init__(self, service: Service):
        self._service = service

    async def load(self, name: str, folder: str | None) -> Model:
        """Serve the adapter in `folder`, by default that of its name.

        Raises: ApiError if that is not allowed, the name is taken, or the adapter is missing or does not fit.
        """
        found = self._folder(name if folder is None else folder)
        if name in self._service.models:
            raise ApiError(409, f"name: the model {name} is served already", code="model_exists", param="name")
        try:
            return model_of(self._service, await self._service.load_adapter(name, str(found)))
        except (InputError, IntegrityError) as error:
            # The message names the folder on this machine, which a client need not know.
            text = str(error).replace(f"{found.parent}/", "")
            raise ApiError(400, text, code="invalid_adapter", param="folder") from error
        except OSError as error:
            raise ApiError(400, f"folder: it cannot be read: {error.strerror}", param="folder") from error

    async def unload(self, name: str) -> Deleted:
        """Forget an adapter after its running answers. Raises: ApiError if there is none, or it is not allowed."""
        self._check_allowed()
        if name not in self._service.models:
            raise ApiError(404, f"the adapter {name!r} is not served", code="model_not_found", param="name")
        await self._service.unload_adapter(name)
        return {"id": name, "object": "model", "deleted": True}

    def folder_of_path(self, path: str) -> str:
        """Return the name of a folder in serve.adapters_folder that a client gives as a path, as vLLM's clients do."""
        self._check_allowed()
        given = Path(path)
        return given.name if given.is_absolute() and given.parent == self._root() else path

    def _check_allowed(self) -> None:
        if not self._service.settings.allow_adapters:
            raise _forbidden("this server loads no adapters at a request: serve.allow_adapters is off")

    def _root(self) -> Path:
        folder = self._service.settings.adapters_folder
        if folder is None:
            raise _forbidden("this server has no serve.adapters_folder to load adapters from")
        return Path(folder).expanduser().absolute()

    def _folder(self, name: str) -> Path:
        """Return the folder of that plain name. Raises: ApiError for a path, or a link that leads elsewhere."""
        self._check_allowed()
        root = self._root()
        plain = name not in ("", ".", "..") and not set(name) & {"/", "\\", ":"} and name.isprintable()
        if not plain or len(name.encode()) > _LONGEST_NAME_BYTES:
            raise _forbidden("folder: it must be the plain name of a folder in serve.adapters_folder", "folder")
        folder = root / name
        if not folder.resolve().is_relative_to(root.resolve()):
            raise _forbidden("folder: it is a link to a place outside of serve.adapters_folder", "folder")
        if not folder.is_dir():
            raise ApiError(404, f"folder: there is no adapter {name!r}", code="not_found", param="folder")
        return folder


def _forbidden(message: str, param: str | None = None) -> ApiError:
    return ApiError(403, message, code="forbidden", param=param)
