"""Push an exported pipeline to the Hugging Face hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tav_jax.errors import HubError, InputError, TavError, short_repr

TIMEOUT = 60.0  # seconds without an answer


def check_push(repository: str, *, private: bool) -> None:
    """Refuse what would fail after a long export: an invalid name, a token that cannot write, or an existing public
    repository that should be private."""
    from huggingface_hub import HfApi, errors, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except errors.HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"--push={short_repr(repository)} is not the name of a repository; give user/name")
    api = HfApi()
    if not get_token():
        raise HubError(
            f"--push needs a token of the hub: make one that can write at {api.endpoint}/settings/tokens, and run "
            "`hf auth login` or set HF_TOKEN"
        )
    with _reporting(repository):
        token = api.whoami().get("auth", {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise HubError(f"{_token()} can only read; {_new_token(api.endpoint)}")
        try:
            is_public = private and not api.repo_info(repository).private
        except errors.RepositoryNotFoundError:
            is_public = False
    if is_public:
        raise HubError(f"{repository} exists and is public; make it private in its settings, or give another name")


def push(directory: Path, repository: str, *, private: bool) -> str:
    """Upload a directory as one commit, to a new or existing repository. Returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _reporting(repository, directory):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload with tav_jax")
    return str(url)


@contextmanager
def _reporting(repository: str, directory: Path | None = None) -> Iterator[None]:
    """Report errors of the hub client in one sentence. By itself the client waits for an answer without a limit."""
    import huggingface_hub
    from huggingface_hub.utils import logging

    session: Any = huggingface_hub.get_session()
    timeout, hooks, verbosity = session.timeout, session.event_hooks, logging.get_verbosity()
    session.timeout = TIMEOUT
    session.event_hooks = {**hooks, "response": [*hooks["response"], _give_up]}
    logging.set_verbosity_error()  # it warns of each attempt
    try:
        yield
    except TavError:
        raise
    except Exception as error:  # the hub client raises many types
        later = f". The export is complete; push it later with `hf upload {repository} {directory}`" * bool(directory)
        raise HubError(f"{repository} could not be pushed: {_problem(repository, error)}{later}") from error
    finally:
        logging.set_verbosity(verbosity)
        session.timeout, session.event_hooks = timeout, hooks


def _give_up(response: Any) -> None:
    """Raise an error where the client would wait for as long as the server says, or repeat a request forever."""
    from huggingface_hub.utils import hf_raise_for_status

    if response.status_code == 429 or (response.status_code == 409 and b"conflicting operation" in response.read()):
        response.read()
        hf_raise_for_status(response)


def _token() -> str:
    return "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `hf auth login`"


def _new_token(hub: str) -> str:
    use = "put it into HF_TOKEN" if os.environ.get("HF_TOKEN") else "run `hf auth login` with it"
    return f"make one that can write at {hub}/settings/tokens, and {use}"


def _problem(repository: str, error: BaseException) -> str:
    """Why the hub client failed, and what to do. The error of an uploaded file is a cause of the one raised."""
    from huggingface_hub import constants, errors

    while not isinstance(error, errors.HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    hub, cause, owner = constants.ENDPOINT, type(error).__name__, repository.partition("/")[0]
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        answer = f"HTTP status {status} of {hub}"
        if status == 401:
            return f"the hub does not accept {_token()} ({answer}); {_new_token(hub)}"
        if status in (402, 403):
            return f"{_token()} may not write there ({answer}); use a name of your own, or {_new_token(hub)}"
        if status == 404:
            return f"the hub knows no user or organization {owner!r} of yours ({answer}); check the spelling"
        if status in (409, 412):
            return f"something else is changing it ({answer}); try again"
        if status == 429:
            wait = error.response.headers.get("Retry-After", "")
            after = f"in {wait} seconds" if wait.isdigit() else "in some minutes"
            return f"the hub has had too many requests ({answer}); try again {after}"
        if status >= 500:
            return f"the hub is not available ({answer}); try again later"
        return f"the hub refuses it ({answer}: {short_repr(error.server_message or '')}); see {hub}/{repository}"
    if cause.endswith("Timeout"):
        return f"the hub at {hub} did not answer within {TIMEOUT:g} seconds; try again later"
    return f"the hub at {hub} cannot be reached ({cause}); check the network"
