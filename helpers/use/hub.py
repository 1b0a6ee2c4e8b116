"""Folders to the Hub, only when asked: refused in one sentence before any work where that cannot be."""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError


class PushError(ValueError):
    """One sentence: the name, what is in the way, what to do."""


def check_push(name: str) -> None:
    """Raise PushError unless `name` is a Hub id and there is a token to write with: before any work."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise PushError(f"PUSH={name} is no name on the Hub; expected user/name.")
    if constants.HF_HUB_OFFLINE:
        raise PushError(f"PUSH={name} needs the Hub, and HF_HUB_OFFLINE is set; unset it, or leave PUSH out.")
    if not get_token():
        raise PushError(f"PUSH={name} needs a token that may write on the Hub, and there is none; `hf auth login`, "
                          "or set HF_TOKEN.")


def push(folders: Mapping[str, Path], private: bool = True) -> list[str]:
    """Upload each folder to the model repository of its name, made (private) where there is none; returns addresses."""
    api, addresses = HfApi(), []
    for name, folder in folders.items():
        try:
            addresses.append(str(api.create_repo(name, private=private, exist_ok=True)))
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"{folder.name} and model card")
        except (HfHubHTTPError, OSError) as error:
            raise PushError(f"{name} cannot be written on the Hub: {str(error).strip().splitlines()[0]}") from error
    return addresses
