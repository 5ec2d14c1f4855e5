"""Where a backbone goes beside its URL: a pointer to the latest one, and the Hugging Face Hub."""

from __future__ import annotations

import json
from typing import Any

from infra.artifacts.artifact import SHORT_ID, Artifact
from infra.errors import UserError
from infra.storage import filesystem


def write_pointer(artifact: Artifact, name: str) -> str:
    """Move the pointer of a name, `NAME.latest.json` beside the backbone, to it; return the pointer's URL.

    It is moved last and at once: who follows it finds a whole backbone.
    """
    parent, _, folder = artifact.url.rstrip("/").rpartition("/")
    url = filesystem.join(parent or ".", f"{name}.latest.json")
    content = json.dumps({"id": artifact.id, "folder": folder}, indent=1).encode()
    if not filesystem.exists(url) or filesystem.read_bytes(url) != content:
        filesystem.write_atomic(url, content)
    return url


def upload(artifact: Artifact, repository: str, private: bool) -> str:
    """Upload a backbone to a repository of the Hub, in one commit, with its id as a tag; return the commit's address.

    The branch main is the latest; a tag stays what it was. A backbone that is there already is not uploaded again.
    The token comes from where the Hub's own library looks for it.

    Raises:
        UserError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, tag = HfApi(), artifact.id[:SHORT_ID]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        there = {each.name: each.target_commit for each in api.list_repo_refs(repository).tags}
        if tag in there:
            return f"{api.endpoint}/{repository}/tree/{tag}"
        paths = {file.path for file in artifact.manifest.files}
        stale = [path for path in api.list_repo_files(repository) if path not in paths and path != ".gitattributes"]
        operations: list[Any] = [
            *(CommitOperationDelete(path) for path in stale),
            *(CommitOperationAdd(path, str(artifact.local_file(path))) for path in sorted(paths)),
        ]
        done: Any = api.create_commit(repository, operations, commit_message=f"fovea {artifact.id}")
        api.create_tag(repository, tag=tag, revision=done.oid, tag_message=artifact.id)
    except Exception as error:  # of networks, each of the Hub's HTTP libraries has its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"hf_repo: {repository}: {reason[0]}; log in with a token that may write (HF_TOKEN), then publish again"
        ) from None
    return f"{api.endpoint}/{repository}/tree/{tag}"
