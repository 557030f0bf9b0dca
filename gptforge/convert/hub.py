"""Upload exports to the Hugging Face Hub and download models from it."""

import logging
from pathlib import Path
from typing import Literal

from gptforge.convert.hf import OTHER_FILES, PYTORCH_WEIGHTS, SAFETENSORS_WEIGHTS
from gptforge.errors import RunError, UserError, first_line, require_package
from gptforge.shell import quote

logger = logging.getLogger(__name__)

# Names that stand for openai-community/NAME.
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def check_repo_id(repo_id: str) -> None:
    """Raise a UserError unless it is a valid owner/name."""
    owner, _, rest = repo_id.partition("/")
    if not owner or not rest or "/" in rest:
        raise UserError(f"--push {repo_id}: give owner/name")
    require_package("huggingface_hub", extra="hf")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        # Validates the name without a request.
        huggingface_hub.hf_hub_url(repo_id, "README.md")
    except HFValidationError as error:
        raise UserError(f"--push {repo_id}: not a valid name on the Hub: {error}") from None


def push_to_hub(
    folder: Path, repo_id: str, *, repo_type: Literal["model", "space"], private: bool
) -> str:
    """Create the repository if it does not exist and upload the folder as one commit.

    Uses the account of `hf auth login` or HF_TOKEN, and the server of HF_ENDPOINT; returns the URL.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    command = f"hf upload {repo_id} {quote(folder.as_posix())}"
    if repo_type == "space":
        command += " --repo-type space"
    if private:
        command += " --private"
    kept = f"{folder.as_posix()} is complete and kept; to upload it: {command}"
    api = huggingface_hub.HfApi()
    try:
        sdk = "docker" if repo_type == "space" else None
        url = api.create_repo(
            repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk
        )
        message = "Upload from GPT-Forge"
        api.upload_folder(
            folder_path=folder, repo_id=repo_id, repo_type=repo_type, commit_message=message
        )
    except LocalTokenNotFoundError:
        what = "--push needs an account: hf auth login, or set HF_TOKEN"
        raise UserError(f"{what}; {kept}") from None
    except OfflineModeIsEnabled:
        raise UserError(f"--push {repo_id}: HF_HUB_OFFLINE forbids it: unset it; {kept}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            hint = f"hf auth login with a token that has write access; {kept}"
            refused = f"--push {repo_id}: the Hub refuses this account ({status})"
            raise UserError(f"{refused}: {hint}") from None
        raise RunError(f"--push {repo_id}: the Hub answered {error}; {kept}") from None
    except Exception as error:
        # The errors of a lost connection depend on huggingface_hub's HTTP client and version.
        raise RunError(f"--push {repo_id}: the upload failed ({error}); {kept}") from error
    return str(url)


def download_model(source: str) -> Path:
    """Download a model from the Hugging Face Hub; returns its folder."""
    require_package("huggingface_hub", extra="hf")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    name = f"openai-community/{source}" if source in OPENAI_MODELS else source
    logger.info(f"downloading {name} from the Hugging Face Hub")
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=[SAFETENSORS_WEIGHTS, *OTHER_FILES]
        )
        if not list(Path(folder).glob(SAFETENSORS_WEIGHTS)):
            huggingface_hub.snapshot_download(name, allow_patterns=[PYTORCH_WEIGHTS])
    except (RepositoryNotFoundError, HFValidationError):
        problem = "neither a path here nor a model that you can access on the Hugging Face Hub"
        hint = "check the name; for a private or gated one, hf auth login first"
        raise UserError(f"{source} is {problem}: {hint}") from None
    except (OSError, ValueError, RuntimeError) as error:
        local = name.rpartition("/")[2]
        raise UserError(
            f"{source} is not a path here, and could not be downloaded from the Hugging Face Hub "
            f"({first_line(error)}): try again with a network; or where there is one, hf download "
            f"{name} --local-dir {local}, copy that folder here and give its path"
        ) from None
    return Path(folder)
