"""Which checkpoints a distillation makes: found, refused or locked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.config import DistillConfig
from distill.objectives.config import DeitConfig
from infra.artifacts.artifact import Artifact, ArtifactSpec, find, find_existing, open_artifact
from infra.artifacts.manifest import ArtifactRef
from infra.errors import UserError
from infra.hashing import hash_file
from pretrain.backbones.identity import backbone_identity
from pretrain.checkpoint.spec import corpus_inputs
from pretrain.config import identity_settings

VERSION = 6


def checkpoint_spec(config: DistillConfig) -> ArtifactSpec:
    """The checkpoint that a configuration asks for; with several students the one that lists theirs.

    Raises:
        UserError: a corpus, a teacher or a start is missing.
    """
    settings, inputs = identity_settings(config), corpus_inputs(config.corpora)
    if config.teacher_checkpoint is not None:
        inputs["teacher"] = open_artifact(config.teacher_checkpoint, "checkpoint").as_ref()
    known = {name: backbone_identity(each) for name, each in config.teachers.items()}
    settings["teachers"] = {name: told for name, (told, _) in known.items()}
    inputs |= {f"teacher_{name}_{key}": each for name, (_, found) in known.items() for key, each in found.items()}
    settings["students"] = {
        name: each.model_dump(mode="json", exclude={"init_from"}) for name, each in config.students.items()
    }
    for name, student in config.students.items():
        if student.init_from is not None:
            inputs[f"start_{name}"] = open_artifact(student.init_from, "checkpoint").as_ref()
    settings["objectives"] = [each.model_dump(mode="json", exclude={"checkpoint"}) for each in config.objectives]
    for each in config.objectives:
        if isinstance(each, DeitConfig):
            if not Path(each.checkpoint).is_file():
                raise UserError(f"{each.checkpoint}: no such file; give the path of the classifier's weights")
            inputs["classifier"] = ArtifactRef(id=hash_file(Path(each.checkpoint)), url=each.checkpoint)
    return ArtifactSpec("checkpoint", "distill", VERSION, settings, inputs)


def student_spec(spec: ArtifactSpec, name: str) -> ArtifactSpec:
    """The checkpoint of one of several students, which does not depend on the others.

    Args:
        planned: what `checkpoint_spec` gives of all students.
    """
    settings = {**spec.settings, "students": {name: spec.settings["students"][name]}}
    inputs = {role: each for role, each in spec.inputs.items() if not role.startswith("start_")}
    start = spec.inputs.get(f"start_{name}")
    return ArtifactSpec(
        "checkpoint", "distill", VERSION, settings, inputs | ({f"start_{name}": start} if start else {})
    )


def student_url(url: str, name: str) -> str:
    """Where the checkpoint of one of several students is, given the URL of what was distilled."""
    return f"{url.rstrip('/')}-{name}"


def student_urls(artifact: Artifact, names: Sequence[str]) -> dict[str, str]:
    """URLs of the students' checkpoints of a distillation: one of a single student is that student's."""
    if len(names) == 1:
        return {names[0]: artifact.url}
    return {name: student_url(artifact.url, name) for name in names}


def require_students(spec: ArtifactSpec, config: DistillConfig) -> None:
    """Look at several students' places before the training.

    Raises:
        UserError: one is taken by another checkpoint, or is gone while what all were trained in is there.
    """
    if len(config.students) == 1:
        return
    url = spec.resolve(config.out)
    gone = [name for name in config.students if find_existing(student_spec(spec, name), student_url(url, name)) is None]
    if gone and find(url) is not None:
        raise UserError(f"{student_url(url, gone[0])}: the student is gone; remove {url} too and run again")
