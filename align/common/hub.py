"""The Hugging Face hub: a repository is asked for before long work begins, and filled by one commit at its end.

The token is whatever ``huggingface_hub`` finds (``HF_TOKEN``, ``hf auth login``); it is no setting, so that no file of
ours holds it. ``HF_ENDPOINT`` names another hub.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from align.common.errors import UserError
from rewards.common.device import Launched
from rewards.common.errors import shortened

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Publishing:
    """Settings of a command whose result may go to the hub.

    Args:
        push_to_hub: put the result (weights, card, pictures; no checkpoints) into a repository of the hub; the token is
            ``HF_TOKEN``'s or that of ``hf auth login``.
        hub_model_id: the repository, NAMESPACE/NAME, or NAME in the token's own namespace; null is the result's name.
        hub_private: make the repository a private one; refused where it is there already and public.
    """

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False

    def repository(self, result: Path, create: bool = True) -> Repository | None:
        """Where ``result`` is to go, which the hub has said may be written; None where it goes nowhere, and in all
        processes of a launch but the first. ``create`` makes it where it is not there. Raises :class:`UserError`."""
        if self.hub_model_id is not None:
            require_id(self.hub_model_id)
        if Launched.here().rank:
            return None
        if not self.push_to_hub:
            if self.hub_model_id is not None or self.hub_private:
                logger.warning("nothing goes to the hub: hub_model_id or hub_private is set, but not push_to_hub")
            return None
        name = self.hub_model_id or result.resolve().name.removesuffix(".safetensors")
        require_id(name)
        return Repository.open(name, self.hub_private, create)


@dataclass(frozen=True)
class Repository:
    """A model repository that may be written."""

    id: str
    private: bool

    @staticmethod
    def open(name: str, private: bool, create: bool) -> Repository:
        """Ask the hub who the token belongs to, make the repository where it is not there (``create``), and ask whether
        it may be written. Raises :class:`UserError` where one of these fails."""
        from huggingface_hub import HfApi, constants, is_offline_mode
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

        api, hub = HfApi(library_name="t2i-align"), constants.ENDPOINT
        if is_offline_mode():
            raise UserError("push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
        with _told(f"push_to_hub: cannot ask {hub} whose the token is"):
            try:
                user = api.whoami()
            except LocalTokenNotFoundError as error:
                raise UserError(
                    "push_to_hub: there is no token; set HF_TOKEN to one that may write, or run `hf auth login`"
                ) from error
            except HfHubHTTPError as error:
                if error.response.status_code != 401:
                    raise
                source = "in HF_TOKEN" if os.environ.get("HF_TOKEN") else "of `hf auth login`"
                raise UserError(
                    f"push_to_hub: {hub} refuses the token {source}; make one that may write at {hub}/settings/tokens"
                ) from error
        repository = name if "/" in name else f"{user['name']}/{name}"
        if create:
            own = ", ".join([user["name"], *(each["name"] for each in user.get("orgs", []))])
            with _told(f"push_to_hub: cannot write to {repository} as {user['name']} (namespaces: {own})"):
                api.create_repo(repository, private=private or None, exist_ok=True)
                api.auth_check(repository, write=True)
                open_to_all = private and not api.model_info(repository).private
            if open_to_all:
                raise UserError(
                    f"hub_private: {repository} is there already, and public; make it private at "
                    f"{hub}/{repository}/settings, or name another by hub_model_id"
                )
        return Repository(repository, private)

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.id}"

    def upload(self, files: Mapping[str, Path | bytes], result: Path, options: str = "") -> None:
        """Put ``files``, by their names there, into the repository: all of them or none. Raises :class:`UserError`,
        which names the command that uploads ``result`` once more, with its ``options``."""
        from huggingface_hub import CommitOperationAdd, HfApi

        private = " --hub_private" if self.private else ""
        where = f"--push_to_hub --hub_model_id {self.id}{private}"
        again = f"python -m align.export {shlex.quote(str(result))} {options}{where}"
        print(f"uploading {len(files)} files to {self.url}; should it be cut short: {again}", flush=True)
        with _told(f"the upload to {self.url} failed", f"; {result} is whole, and {again} uploads it once more"):
            added = [
                CommitOperationAdd(name, str(source) if isinstance(source, Path) else source)
                for name, source in files.items()
            ]
            HfApi(library_name="t2i-align").create_commit(self.id, added, commit_message="Upload by t2i-align")
        print(f"uploaded to {self.url}")


def require_id(name: str) -> None:
    """Raise :class:`UserError` for what cannot be a repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"hub_model_id: {name!r} cannot be a repository's name ({shortened(str(error), 300)}); give NAMESPACE/NAME"
        ) from error


@contextlib.contextmanager
def _told(what: str, after: str = "") -> Iterator[None]:
    """Errors of the hub's client, of whatever kind (its HTTP library changes between versions), in one line after
    ``what``, with no token in it."""
    from huggingface_hub import get_token

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error  # its upload threads'
        response = getattr(cause, "response", None)
        said = getattr(cause, "server_message", None) or str(cause)
        said = f"{type(cause).__name__ if response is None else response.status_code}: {said}"
        if token := get_token():
            said = said.replace(token, "[token]")
        raise UserError(f"{what}: {shortened(said, 400)}{after}") from error
