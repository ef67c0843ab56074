"""A compressed model onto the Hugging Face hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.errors import UserError, reason

if TYPE_CHECKING:
    from rich.console import Console


def check_login() -> None:
    """Raises UserError if nobody is logged in to the hub; asks no server."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            "Expected a login to the Hugging Face hub, found none: run `hf auth login`, or set "
            "HF_TOKEN to a token that may write."
        )


def push(folder: Path, repo_id: str, private: bool, console: "Console") -> str:
    """Upload a folder into a model repository, which is made if need be; returns its address.

    Raises UserError if the hub refuses, or if `private` and the repository is public.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise UserError(
                f"The repository '{repo_id}' exists and is public, which --private rules out: "
                "choose another name, or make it private first."
            )
        with console.status(f"uploading to {url.repo_id}"):
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                commit_message="Upload a model compressed by sp3llm",
                ignore_patterns=["*.partial*", "*.new", ".lock"],
            )
    except UserError:
        raise
    except Exception as error:  # the hub raises many kinds: unauthorised, offline, bad names
        raise UserError(
            f"Cannot push to '{repo_id}' ({type(error).__name__}: {reason(error)}): check the "
            "name (owner/name), the network, and that the token may write."
        ) from error
    return str(url)
