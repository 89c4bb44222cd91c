"""Every error that a user can meet.

    EnsemblerError
    ├── InputError              what was given cannot be run; exit code 2, nothing was written
    │   ├── ConfigError         a rule, role, key or number
    │   ├── MemberError         a model, an adapter or their files
    │   │   └── HubError        a hub that cannot be reached: no other of its models can be found either
    │   ├── PatchError          a patch, or a model that it does not fit
    │   │   └── UnsupportedPatchError   an adapter that is no sum with the weights
    │   ├── VocabularyError     members that do not share a vocabulary
    │   ├── ClassesError        image classifiers that do not share their classes
    │   ├── ImageError          an image or a folder of images
    │   ├── PromptError         a prompt or a file of prompts
    │   ├── OutputError         a place to write to
    │   └── MissingExtraError   an optional package that is not installed
    ├── PlacementError          members that fit on no device; exit code 1
    └── RunError                a run that failed half-way; exit code 1, finished rows are kept
        ├── StoreError          results that cannot be written any more
        ├── LogitsError         a member computed NaN
        └── RankError           one of several processes was lost

A message is one line: what was given, what was expected, what to do. Only the command line turns these into
``Error: ...``; a library never prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class EnsemblerError(Exception):
    """Base of all errors of this package; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(EnsemblerError, ValueError):
    """Input that cannot be run."""

    exit_code = 2


class ConfigError(InputError):
    """An unknown rule, role or key, a missing role, or a number out of range."""


class MemberError(InputError):
    """A member's model, adapter or weights file is missing, damaged or does not fit."""


class HubError(MemberError):
    """A model is not on this machine, and the hub cannot be reached."""


class PatchError(InputError):
    """A patch is damaged, of a kind that cannot be added to weights, or does not fit the model."""


class UnsupportedPatchError(PatchError):
    """An adapter is of a kind that is no sum with the weights: PEFT may run it, and it cannot be added to them."""


class VocabularyError(InputError):
    """Members do not give the same ids to the same tokens."""


class ClassesError(InputError):
    """Image classifiers do not have the same classes in the same order, or lack one that is asked for."""


class ImageError(InputError):
    """An image cannot be read or is beyond the limits, or a folder holds none."""


class PromptError(InputError):
    """A prompt is empty, too long, or its file cannot be read."""


class OutputError(InputError):
    """The output exists already or cannot be written."""


class MissingExtraError(InputError):
    """An optional package is missing; the message holds the pip line."""

    def __init__(self, package: str, command: str) -> None:
        super().__init__(f"{package} is not installed; install it with: {command}")


class PlacementError(EnsemblerError):
    """Members do not fit into the budgets, not even quantised."""


class RunError(EnsemblerError):
    """A run failed half-way; what was finished is kept."""


class StoreError(RunError):
    """The store of results cannot be written any more: a full disk, or another process began it anew."""


class LogitsError(RunError):
    """A member computed NaN logits."""


class RankError(RunError):
    """One of several processes was lost; `reporter` is the rank that tells the user, so that it is said once."""

    def __init__(self, message: str, reporter: int) -> None:
        super().__init__(message)
        self.reporter = reporter


def nearest(name: object, known: Sequence[str]) -> str:
    """Return the end of an error's sentence: the nearest of the known names, or all of them."""
    near = get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known)}"
