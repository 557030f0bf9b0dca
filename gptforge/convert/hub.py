"""Sending an exported folder to the Hugging Face Hub."""

from pathlib import Path
from typing import Literal

from gptforge.convert.extras import require
from gptforge.errors import RunError, UserError


def check_name(name: str) -> None:
    """Raise a UserError unless it is owner/name."""
    owner, _, rest = name.partition("/")
    if not owner or not rest or "/" in rest:
        raise UserError(f"--push {name}: give owner/name")
    require("huggingface_hub", extra="hf")


def push(folder: Path, name: str, *, kind: Literal["model", "space"], private: bool) -> str:
    """Make the repository if it is not there, and upload the folder as one commit.

    The account is the one that `hf auth login` or HF_TOKEN says; HF_ENDPOINT names another server.

    Returns:
        Where to see it.

    Raises:
        UserError: if the Hub does not take the token or the name.
        RunError: if it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(
            name,
            repo_type=kind,
            private=private,
            exist_ok=True,
            space_sdk="gradio" if kind == "space" else None,
        )
        api.upload_folder(
            folder_path=folder,
            repo_id=name,
            repo_type=kind,
            commit_message="Upload from GPT-Forge",
        )
    except LocalTokenNotFoundError:
        raise UserError("--push needs an account: hf auth login, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise UserError(
                f"--push {name}: the Hub refuses this account ({status}): hf auth login with a "
                "token that may write there"
            ) from None
        raise RunError(f"--push {name}: the Hub answered {error}; the folder is kept") from None
    except OSError as error:
        raise RunError(f"--push {name}: no connection ({error}); the folder is kept") from None
    return str(url)
