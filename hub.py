"""Networks of others, such as autoencoders and text encoders: a folder here, or a name of Hugging Face's hub."""

import hashlib
import os
import textwrap
from collections.abc import Iterable
from pathlib import Path

from cli import RunStopped, UsageError

HUB_TIMEOUT = 3  # seconds until an unreachable hub is given up
PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]  # of the files of a network and its tokenizer


def place_of(path: str, names: dict[str, str], what: str) -> str:
    """An absolute path for what is a folder here, a hub name for the rest; `names` are short ones.

    Raises:
        UsageError: a misspelt folder.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return os.path.abspath(path)  # a checkpoint keeps it, and sampling may start in another folder
    if os.path.exists(path):
        raise UsageError(f"{what} path {path} is a file; expected the folder that holds its config.json")
    name = names.get(path, path)
    if path.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UsageError(f"{what} path {path} does not exist; a hub name has the form owner/name")
    return name


def file_of(place: str, filename: str, what: str, below: Iterable[str] = ()) -> str:
    """Path of one of the files of a `place_of`, in its folder or those `below`; what the hub has is downloaded.

    Raises:
        UsageError: it is not there, and, where the hub is asked, cannot be fetched within `HUB_TIMEOUT`.
    """
    if os.path.isabs(place):
        for folder in (place, *(os.path.join(place, name) for name in below)):
            if os.path.isfile(os.path.join(folder, filename)):
                return os.path.join(folder, filename)
        inside = "".join(f", nor in a folder {name} in it" for name in below)
        raise UsageError(f"no {filename} in {place}{inside}: that is no {what}")

    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError  # the base class of whichever HTTP client the hub uses

    try:
        if isinstance(cached := try_to_load_from_cache(place, filename), str):
            return cached
        # Asked first, and once: hf_hub_download tries a silent network again and again for most of a minute.
        get_hf_file_metadata(hf_hub_url(place, filename), timeout=HUB_TIMEOUT)
        return hf_hub_download(place, filename)
    except (OSError, HTTPError, ValueError) as error:
        raise UsageError(
            f"{what} {place} is no folder here and not in the hub's local cache, and its {filename} cannot be "
            f"fetched ({brief(error)}); download it where there is a network and give its folder as {what} path"
        ) from error


def load_network(kind, folder: str, what: str, **options):
    """A network of `transformers`, by one of its classes, from a folder; frozen.

    Raises:
        UsageError: it cannot be loaded, or tensors are missing, which would be left at random values.
    """
    from transformers import logging

    logging.set_verbosity_error()  # else it tells of heads that are not needed
    logging.disable_progress_bar()
    try:
        network, info = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise UsageError(f"cannot load the {what} in {folder}: {brief(error)}") from None
    if missing := info["missing_keys"]:
        raise UsageError(f"the weights of the {what} in {folder} lack {len(missing)} tensors, e.g. {min(missing)}")
    return network.eval().requires_grad_(False)


def fingerprint(network) -> str:
    """SHA-256 over names and some values of the weights, in bf16, which is what a GPU computes with."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.flatten()
        values = values[:: max(1, len(values) // 64)].bfloat16().float().cpu()
        checksum.update(f"{name} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return checksum.hexdigest()


def fetch(place: str, what: str) -> None:
    """Have the files of a network of the hub here; nothing for a folder. Raises UsageError."""
    if os.path.isabs(place):
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        snapshot_download(place, allow_patterns=PATTERNS)
    except (OSError, HTTPError, ValueError) as error:
        raise UsageError(f"the files of the {what} {place} cannot be fetched ({brief(error)})") from None


def check_push(name: str) -> None:
    """Raises UsageError where nothing could be uploaded to a repository of this name."""
    from huggingface_hub import get_token

    if name.count("/") != 1 or not all(name.split("/")):
        raise UsageError(f"--push-to-hub {name}: a repository has the form OWNER/NAME")
    if get_token() is None:
        raise UsageError(f"--push-to-hub {name} needs a token of the hub: `hf auth login`, or HF_TOKEN")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder to a repository, which is made if there is none; returns its address.

    Raises:
        RunStopped: the hub says no, or nothing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        address = HfApi().create_repo(name, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["**/__pycache__/**"])
    except (OSError, HTTPError, ValueError) as error:
        raise RunStopped(
            f"{folder} is written and was not uploaded ({brief(error)}): `hf upload {name} {folder}` does that"
        ) from None
    return str(address)


def brief(error: Exception) -> str:
    return textwrap.shorten(str(error), 300)
