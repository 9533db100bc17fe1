from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.families.tiny import TinyFamily, save


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyFamily]:
    """`tiny(model_type)`: the tiny model of a family."""
    made: dict[str, TinyFamily] = {}

    def get(name: str) -> TinyFamily:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
