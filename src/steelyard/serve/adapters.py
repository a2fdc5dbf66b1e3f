"""Adapters that come and go while the server runs: only from one folder that the operator named.

Knows the table of served models and the engines' clients; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from steelyard.checkpoint.manifest import kind_of
from steelyard.errors import CheckpointError, ConfigError, ModelNotFoundError, RequestError
from steelyard.serve.models import ADAPTER_NAME, ServedModel, adapter_model


class AdapterFolder:
    """Loads adapters from inside `folder` into the engines, and keeps the table of models true.

    Args:
        folder: where adapters may be.
        models: the table; it gains and loses adapters.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, folder: Path, models: dict[str, ServedModel]) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--adapter-folder '{folder}': there is no such folder")
        self._folder, self._models = folder.resolve(), models
        self._one_by_one = asyncio.Lock()

    async def load(self, name: str, path: str, base: str | None) -> str:
        """Serve an adapter by this name; one that has the name is swapped, its requests run to their end.

        Args:
            name: the model's id from now on.
            path: its folder, absolute or from the adapter folder on.
            base: the id of the model that it belongs to; None where there is one.

        Returns:
            The adapter's digest.

        Raises:
            RequestError: a name that is none or a base model's, a path outside the folder, no adapter of this base.
            ModelNotFoundError: no such base.
            EngineUnavailableError: the engine is not ready, or died meanwhile.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise RequestError("'lora_name' must be of letters, digits and . _ : / -, 128 at most", param="lora_name")
        async with self._one_by_one:
            served = self._base(name, base)
            try:
                folder = await asyncio.to_thread(self._inside, path)
                new = await asyncio.to_thread(adapter_model, name, folder, served)
                digest = await served.engine.load_adapter(name, folder)
            except (CheckpointError, RequestError) as error:
                reason = str(error).replace(f"{self._folder}/", "")
                raise RequestError(reason, param="lora_path", code="invalid_adapter") from None
            old, self._models[name] = self._models.get(name), new
            await self._close(old)
            return digest

    async def unload(self, name: str) -> None:
        """Serve this adapter no more; its requests run to their end.

        Raises:
            ModelNotFoundError: no such adapter.
            EngineUnavailableError: the engine is not ready, or died meanwhile.
        """
        async with self._one_by_one:
            served = self._models.get(name)
            if served is None or served.adapter is None:
                raise ModelNotFoundError(f"no adapter is called '{name[:80]}' here", param="lora_name")
            await served.engine.drop_adapter(name)
            del self._models[name]
            await self._close(served)

    def _base(self, name: str, base: str | None) -> ServedModel:
        bases = {served.id: served for served in self._models.values() if served.is_base}
        if base is not None and base not in bases:
            raise ModelNotFoundError(f"there is no base model '{base[:80]}' here", param="base_model_name")
        if base is None and len(bases) > 1:
            raise RequestError(f"say for which model: one of {', '.join(bases)}", param="base_model_name")
        served = next(iter(bases.values())) if base is None else bases[base]
        old = self._models.get(name)
        if old is not None and (old.adapter is None or old.engine is not served.engine):
            taken = "a whole model" if old.adapter is None else "an adapter of another model"
            raise RequestError(f"'{name}' is {taken} here: choose another name", param="lora_name")
        return served

    def _inside(self, path: str) -> Path:
        """The folder that `path` names, if it and its files are inside ours, links followed."""
        try:
            folder = (self._folder / path).resolve(strict=True)
            places = [folder, *(file.resolve(strict=True) for file in folder.iterdir())]
        except (OSError, RuntimeError, ValueError):
            places = []
        if not places or not all(place.is_relative_to(self._folder) for place in places):
            raise RequestError(
                "'lora_path' must name an adapter's folder inside the server's adapter folder", param="lora_path"
            )
        if kind_of(folder) != "adapter":
            raise RequestError("'lora_path' names a whole model, not an adapter", param="lora_path")
        return folder

    async def _close(self, old: ServedModel | None) -> None:
        """End the template's process, unless others use it; a request that still renders starts it once more."""
        template = None if old is None else old.template
        if template is not None and all(other.template is not template for other in self._models.values()):
            await asyncio.to_thread(template.close)
