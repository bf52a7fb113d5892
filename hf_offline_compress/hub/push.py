"""Publishing a finished folder: verified first, then uploaded and committed at once, wholly or not at all."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn

from ..artifact.reading import is_part
from ..card import CARD_FILE
from ..card.snippets import with_model_id
from ..errors import CompressionError, listing, shortened
from ..foundation.arguments import token_of
from ..foundation.hub_errors import ATTEMPTS, explain, is_broken_connection, is_passing, patiently, status_of
from ..foundation.progress import stage
from ..verifying import check_files, folder_files, trainer_files, verify_folder, write_record
from ..version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo
    from transformers import PreTrainedModel

# Files of an earlier push that would be loaded instead of the new ones, or beside them.
_SUPERSEDED = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|\w+_compressed\.py|"
    r"onnx/model(_quantized)?\.onnx"
)


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        repo_id: of the repository, with its owner.
        url: of the commit.
        commit: its hash.
        revision: branch that it is on.
        pull_request: its address, if one was made.
        files: those of the folder that are now published.
        removed: files of an earlier push that were deleted.
        changed: whether there was anything to commit.
        left_out: files beside the model that were not published.
        remarks: sentences that the user should read.
    """

    repo_id: str
    url: str
    commit: str
    revision: str
    pull_request: str | None = None
    files: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: bool = True
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    description: str = "",
    create_pr: bool = False,
    token: str | None = None,
    trust_remote_code: bool = False,
    include: Sequence[str] = (),
) -> Pushed:
    """Verify a compressed folder and publish it as one commit to a model repository, which is created if missing.

    An interrupted push can be repeated: weights that have arrived are not sent again. The snippets of the card that is
    uploaded load the repository; the folder's own card stays. The user's notes in a card on the Hub are kept. Nothing else
    in the repository is touched, but weights and code that the new ones replace.

    Args:
        folder: a compressed folder.
        repo_id: "name" or "owner/name".
        private: make the repository private; it must not be public already.
        revision: a branch, created from main if missing; main by default.
        message: the commit's first line.
        description: the rest of the commit's message.
        create_pr: propose the commit as a pull request, in a repository of somebody else.
        token: by default the one that you are logged in with, or HF_TOKEN.
        trust_remote_code: run the folder's code to verify it, even if it is not that of this package.
        include: other files to publish, by their names in the folder.

    Raises:
        CompressionError: the folder fails a check, or the Hub rejects it. The message says what was published.
    """
    path = Path(folder)
    push = _Push(repo_id, private=private, revision=revision, create_pr=create_pr, token=token_of(token))
    check_files(path)
    names, left_out = _selected(path, [include] if isinstance(include, str) else include)
    with stage("asking the Hub"):
        push.prepare()
    _require_verified(path, trust_remote_code, push.token)
    push.remarks += _remarks(path, left_out)
    message = message or f"Upload compressed model (hf-offline-compress {__version__})"
    with stage("uploading"):
        return replace(push.upload(path, names, (message, description)), left_out=tuple(left_out))


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: Sequence[str] | None = None,
) -> str:
    """Save a compressed model, verify it and publish it; return the commit's address. See `push_folder`.

    If it was loaded from a local folder with a card, the card goes along. So `model.push_to_hub(...)` does what it does
    for any other model, with the same options, and does not put a card of its own over yours.

    Args:
        model: a compressed model.
        repo_id: "name" or "owner/name".
        commit_message: the commit's first line.
        commit_description: the rest of the commit's message.
        private: make the repository private.
        token: by default the one that you are logged in with.
        revision: a branch.
        create_pr: propose the commit as a pull request.
        max_shard_size: larger weights are split into files of this size.
        tags: added to the card.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder, max_shard_size=max_shard_size or "50GB")
        card = Path(model.config.name_or_path or ".") / CARD_FILE
        if model.config.name_or_path and card.is_file():
            (folder / CARD_FILE).write_bytes(card.read_bytes())
        if tags:
            _add_tags(folder / CARD_FILE, tags)
        write_record(folder, model)
        pushed = push_folder(
            folder,
            repo_id,
            private=bool(private),
            revision=revision,
            message=commit_message,
            description=commit_description or "",
            create_pr=create_pr,
            token=token if isinstance(token, str) else None,
        )
    return pushed.url


def _selected(folder: Path, include: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the files of a folder to publish, and those that are left out.

    Raises:
        CompressionError: a file to include is not there, or never published.
    """
    there, trainer = folder_files(folder), trainer_files(folder)
    wanted = {PurePath(name).as_posix() for name in include}
    aside = [name for name in there if not is_part(name)]
    for name in sorted(wanted.difference(there)):
        if name in trainer:
            raise CompressionError(
                f"'{name}' is never published: it belongs to Trainer, and the model loads without it. Leave it out of include "
                "(--include)."
            )
        raise CompressionError(
            f"There is no file '{name}' in '{folder.name}' to include; name files as they are called in the folder, "
            + (f"e.g. '{aside[0]}'." if aside else "which has none beside the model.")
        )
    left = [name for name in aside if name not in wanted]
    return [name for name in there if name not in left], [*left, *trainer]


def _remarks(folder: Path, left_out: list[str]) -> list[str]:
    """Return sentences about the files that are not published."""
    trainer = trainer_files(folder)
    unknown = [name for name in left_out if name not in trainer]
    remarks = [f"Trainer's files were left out: {shortened(trainer)}."] if trainer else []
    if unknown:
        remarks.append(
            f"Left out because they are not part of the model: {listing(unknown)}. `push --include NAME` publishes "
            "such a file as well."
        )
    return remarks


def _require_verified(folder: Path, trust_remote_code: bool, token: str | None) -> None:
    failed = verify_folder(folder, trust_remote_code=trust_remote_code, token=token).failed
    if failed:
        found = " ".join(f"{check.name}: {check.sentence}" for check in failed[:3])
        more = f" And {len(failed) - 3} more checks." if len(failed) > 3 else ""
        raise CompressionError(
            f"'{folder.name}' was not published, because it failed {len(failed)} checks of `verify`. {found}{more}"
        )


def _add_tags(card: Path, tags: Sequence[str]) -> None:
    from huggingface_hub import ModelCard

    content = ModelCard(card.read_text("utf-8") if card.is_file() else "---\nlibrary_name: transformers\n---\n")
    data: Any = content.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    card.write_text(str(content), "utf-8")


@dataclass
class _Push:
    """One push, step by step; what a failure leaves behind is known at each."""

    repo_id: str
    private: bool
    revision: str | None
    create_pr: bool
    token: str | None
    remarks: list[str] = field(default_factory=list)
    made: str = ""  # what was made before the commit, as the end of a sentence
    unsure: bool = False  # whether the Hub may have a commit that it could not tell us of

    @property
    def branch(self) -> str:
        return self.revision or "main"

    def prepare(self) -> None:
        """Ask for all that can be asked beforehand: token, account, repository. Nothing is made.

        Raises:
            CompressionError: what was asked for cannot be done.
        """
        self._check_request()
        account = self._ask(self.api.whoami)
        if "/" not in self.repo_id:
            self.repo_id = f"{account['name']}/{self.repo_id}"
        if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise CompressionError(
                f"The token of '{account['name']}' is read-only, so nothing was published; create one with write permission at "
                "https://huggingface.co/settings/tokens."
            )
        self.exists = self._find() is not None

    def upload(self, folder: Path, names: list[str], message: tuple[str, str]) -> Pushed:
        """Make repository and branch if they are not there, send the files, and commit them.

        Args:
            folder: that they lie in.
            names: of the files.
            message: of the commit, its first line and the rest.

        Raises:
            CompressionError: the Hub does not take it.
        """
        try:
            return self._upload(folder, names, message)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._state()) from None

    def _upload(self, folder: Path, names: list[str], message: tuple[str, str]) -> Pushed:
        from huggingface_hub import CommitOperationDelete

        if not self.exists:
            self._make()
        parent = self._branch()
        additions = self._additions(folder, names)
        siblings = [sibling.rfilename for sibling in parent.siblings or []]
        removed = [name for name in siblings if _SUPERSEDED.fullmatch(name) and name not in names]
        self._ask(
            lambda: self.api.preupload_lfs_files(
                self.repo_id, additions, revision=self.revision, create_pr=self.create_pr
            ),
            attempts=1,  # each of its requests is repeated where it has to be
        )
        operations = [*additions, *(CommitOperationDelete(name) for name in removed)]
        done = self._commit(operations, additions, message, str(parent.sha))
        return Pushed(
            repo_id=self.repo_id,
            url=str(done.commit_url),
            commit=done.oid,
            revision=done.pr_revision or self.branch,
            pull_request=done.pr_url,
            files=tuple(sorted(names)),
            removed=tuple(removed),
            changed=done.oid != parent.sha,
            remarks=tuple(self.remarks),
        )

    def _check_request(self) -> None:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise CompressionError(
                f"'{self.repo_id}' is not a repository name; write name or owner/name, of letters, digits, '-', '_' and "
                "'.', e.g. me/minilm-small."
            ) from error
        if self.create_pr and self.revision not in (None, "main"):
            raise CompressionError(
                "A pull request targets main, so it cannot be combined with another revision; leave one of the two out."
            )
        if constants.is_offline_mode():
            raise CompressionError("HF_HUB_OFFLINE is set, so nothing was published; unset it to push.")
        self.token = self.token or get_token()
        if not self.token:
            raise CompressionError(
                "There is no token for the Hub, so nothing was published; run `hf auth login`, set HF_TOKEN, or pass one."
            )
        self.api: HfApi = HfApi(token=self.token)

    def _find(self) -> ModelInfo | None:
        """Return the repository, or None if it is not there yet; make sure that it is what was asked for."""
        found: ModelInfo | None = self._lookup("model")
        if found is None:
            self._check_other_types()
            if self.create_pr:
                raise CompressionError(
                    f"There is no repository '{self.repo_id}' to open a pull request in, so nothing was published; leave "
                    "create_pr (--create-pr) out to create it."
                )
        elif self.private and not found.private:
            raise CompressionError(
                f"'{self.repo_id}' is already public, so nothing was published; leave private (--private) out, or make it "
                "private in its settings first."
            )
        return found

    def _check_other_types(self) -> None:
        for kind in ("dataset", "space"):
            if self._lookup(kind) is not None:
                raise CompressionError(
                    f"'{self.repo_id}' is a {kind} on the Hub and not a model, so nothing was published; choose another name, "
                    f"or create a model of that name first with `hf repos create {self.repo_id}`."
                )

    def _lookup(self, kind: str) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return self._ask(lambda: self.api.repo_info(self.repo_id, repo_type=kind), passing=RepositoryNotFoundError)
        except RepositoryNotFoundError:
            return None

    def _make(self) -> None:
        self._ask(lambda: self.api.create_repo(self.repo_id, private=self.private or None, exist_ok=True))
        self.made = f"; the repository '{self.repo_id}' now exists and is empty"
        self.exists = True

    def _branch(self) -> ModelInfo:
        """Return what is on the branch now; it is made if it is not there."""
        from huggingface_hub.errors import RevisionNotFoundError

        def look() -> ModelInfo:
            return self.api.model_info(self.repo_id, revision=self.revision)

        # What is asked next is outside of the handler, so that an error there is not taken for this one.
        with suppress(RevisionNotFoundError):
            return self._ask(look, passing=RevisionNotFoundError)
        self._ask(lambda: self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True))
        self.made = self.made or f"; the branch '{self.branch}' now exists and equals main"
        return self._ask(look)

    def _additions(self, folder: Path, names: list[str]) -> list[CommitOperationAdd]:
        from huggingface_hub import CommitOperationAdd

        additions = []
        for name in names:
            content: str | bytes = str(folder / name)
            if name == CARD_FILE:
                card = with_model_id((folder / name).read_text("utf-8"), self.repo_id)
                content = self._with_published_notes(card).encode()
            additions.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
        if not any(addition.path_in_repo == CARD_FILE for addition in additions):
            self.remarks.append(f"The folder has no {CARD_FILE}; `hf-offline-compress card` writes a model card.")
        return additions

    def _with_published_notes(self, card: str) -> str:
        """Return a card with what the user wrote into the card on the Hub."""
        from ..card.writing import BEGIN, END, free_section

        published = self._published_card()
        mine, theirs = free_section(card), None if published is None else free_section(published)
        if published is None or mine is None or mine == theirs:
            return card
        if theirs is None:
            # A card that we did not write is the user's own from the first line to the last.
            theirs = re.sub(r"\A\s*---\n.*?\n---[ \t]*(\n|\Z)", "", published, flags=re.DOTALL).strip("\n")
            if not theirs.strip() or "automatically generated" in theirs:
                return card
            theirs += "\n"
        if not theirs.strip():
            return card
        if mine.strip():
            self.remarks.append(
                "The notes in the card on the Hub were kept, and not replaced by those of the folder; edit them there."
            )
        start = card.index(BEGIN) + len(BEGIN)
        return f"{card[:start]}\n{theirs}{card[card.index(END, start) :]}"

    def _published_card(self) -> str | None:
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with tempfile.TemporaryDirectory() as scratch:

            def fetch() -> str:
                return self.api.hf_hub_download(self.repo_id, CARD_FILE, revision=self.revision, local_dir=scratch)

            try:
                return Path(self._ask(fetch, passing=RemoteEntryNotFoundError)).read_text("utf-8")
            except RemoteEntryNotFoundError:
                return None

    def _commit(
        self, operations: list[Any], additions: list[CommitOperationAdd], message: tuple[str, str], parent: str
    ) -> CommitInfo:
        """Commit once, however often it has to be tried: only if the branch is what it was, or has our files already."""

        def attempt() -> CommitInfo:
            self.unsure = True  # until there is an answer
            try:
                return self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message[0],
                    commit_description=message[1],
                    revision=self.revision,
                    create_pr=self.create_pr,
                    parent_commit=parent,
                )
            except Exception as error:
                # An answer may have been lost on the way back: what counts is what is there.
                self.unsure = is_broken_connection(error) or (status_of(error) or 0) >= 500
                if not self.create_pr and (self.unsure or status_of(error) in (409, 412)):
                    done = self._arrived(additions, message[0], parent)
                    self.unsure = False
                    if done:
                        return done
                raise

        try:
            # A pull request that was made although its answer was lost would be made twice.
            return attempt() if self.create_pr else patiently(attempt)
        except Exception as error:
            self._fail(error)

    def _arrived(self, additions: list[CommitOperationAdd], message: str, parent: str) -> CommitInfo | None:
        """Return our commit if the branch has moved on and holds exactly what was sent."""
        from huggingface_hub import CommitInfo

        found = patiently(lambda: self.api.model_info(self.repo_id, revision=self.revision))
        if found.sha == parent or found.sha is None:
            return None
        names = [addition.path_in_repo for addition in additions]
        there = patiently(lambda: self.api.get_paths_info(self.repo_id, names, revision=found.sha))
        if {_published_hash(file) for file in there} != {_own_hash(addition, there) for addition in additions}:
            return None
        url = f"{self.api.endpoint}/{self.repo_id}/commit/{found.sha}"
        return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=found.sha)

    def _ask(self, call: Any, passing: type[BaseException] | None = None, attempts: int = ATTEMPTS) -> Any:
        """Call the Hub with patience; an error becomes a sentence, but for those that the caller waits for."""
        try:
            return patiently(call, attempts)
        except Exception as error:
            if passing is not None and isinstance(error, passing):
                raise
            self._fail(error)

    def _state(self) -> str:
        """Return what is there after a failure."""
        if not self.unsure:
            return f"nothing was published{self.made}"
        where = "among its pull requests" if self.create_pr else f"on '{self.branch}'"
        return (
            f"it is not known whether '{self.repo_id}' received the commit, but it has all of it or nothing; look {where}, or "
            "run this again"
        )

    def _fail(self, error: Exception) -> NoReturn:
        state = self._state()
        if not self.unsure and (is_passing(error) or status_of(error) in (409, 412)):
            state += "; run this again to resume"
        raise CompressionError(f"{explain(error, self.repo_id)}; {state}.") from error


def _published_hash(file: Any) -> tuple[str, str]:
    return file.path, file.lfs.sha256 if file.lfs else file.blob_id


def _own_hash(addition: CommitOperationAdd, there: list[Any]) -> tuple[str, str]:
    """Return name and hash of a file, as the Hub gives it: sha256 of large ones, git's own of the others."""
    if any(file.path == addition.path_in_repo and file.lfs for file in there):
        return addition.path_in_repo, addition.upload_info.sha256.hex()
    with addition.as_file() as stream:
        content = stream.read()
    return addition.path_in_repo, hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
