"""The parts of a pipeline that diffusers loads, one by one, from their folders: the network and its objective.

Both stand on the project's own modules, which lie in `scheduler/modules`: there because a download of a pipeline takes
all of a folder without weights. They are imported as a package whose name tells their content, so that pipelines of
several versions live side by side, and none of them touches modules of the same names.
"""

import hashlib
import importlib.util
import sys
from pathlib import Path

from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config


def package_beside(part: str) -> str:
    """The name of the package of modules that came with a part of a pipeline, whose folder this is."""
    folder = Path(part).absolute().parent / "scheduler" / "modules"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    name = f"sparse_dit_{digest.hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return name


class OfModules:
    """What is loaded from a folder with modules beside it."""

    package = ""

    @classmethod
    def module(cls, name: str):
        """One of the modules that came with this part."""
        return importlib.import_module(f"{cls.package}.{name}")

    @classmethod
    def from_pretrained(cls, folder, *args, **options):
        part = Path(folder, options.get("subfolder") or "")
        bound = type(cls.__name__, (cls,), {"package": package_beside(part), "__module__": cls.__module__})
        return super(OfModules, bound).from_pretrained(folder, *args, **options)


class SparseDiT(OfModules, ModelMixin, ConfigMixin):
    """The network. `description` is what its checkpoint said of it, the latent space and the data among that."""

    @register_to_config
    def __init__(self, description: dict):
        super().__init__()
        config = self.module("configuration").DiTConfig.from_dict(description["model"])
        self.network = self.module("models").DiT(config)

    def forward(self, x, t, condition):
        """(N, C, H, W), network time (N,), labels (N,) or a batch of prompts -> (N, C or 2C, H, W)."""
        return self.network(x, t, condition)


class SparseDiTObjective(OfModules, SchedulerMixin, ConfigMixin):
    """What the network was trained for, which also knows how images are drawn from it."""

    @register_to_config
    def __init__(self, objective: dict):
        self.objective = self.module("diffusion").objective_from_config(dict(objective))
