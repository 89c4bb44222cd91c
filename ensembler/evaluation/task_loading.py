"""Find tasks by the names that lm-eval knows or by the path of a YAML file, and load them with their documents."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any, cast

from ensembler.errors import ConfigError, EnsemblerError
from ensembler.evaluation.lm_eval_settings import PromptSettings, silence_lm_eval
from ensembler.evaluation.tasks import TextTask
from ensembler.extras import require

_YAML = (".yaml", ".yml")


def load_tasks(
    names: Sequence[str],
    settings: PromptSettings | None = None,
    *,
    include_path: Path | None = None,
    confirm_run_unsafe_code: bool = False,
) -> list[TextTask]:
    """Return the tasks of `names`, groups and tags expanded.

    A name is one that lm-eval knows, one of a YAML file in `include_path` (which wins), or the path of a YAML file.
    Local data files in a YAML file are looked for in its folder, then in the current one. Tasks that run code which a
    model wrote need `confirm_run_unsafe_code`, as in lm-eval. Raises ConfigError.
    """
    if not names:
        raise ConfigError("no task was given; give a name that lm-eval knows or the path of a YAML file")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"{include_path} is no folder; --include-path takes a folder of YAML tasks")
    loader = _Loader(include_path, confirm_run_unsafe_code)
    tasks = [TextTask(task, settings or PromptSettings()) for name in names for task in loader.load(name)]
    for index, task in enumerate(tasks):
        if task.name in [other.name for other in tasks[:index]]:
            raise ConfigError(f"task {task.name} is given twice; leave one out")
    return tasks


class _Loader:
    """Loads by name. lm-eval's own index, of 14,000 tasks, takes many seconds: made when a name needs it."""

    def __init__(self, include_path: Path | None, confirm_run_unsafe_code: bool) -> None:
        self._include_path = include_path
        self._confirmed = confirm_run_unsafe_code
        self._managers: dict[bool, Any] = {}

    def load(self, name: str) -> list[Any]:
        """Return lm-eval's tasks of one name."""
        path = Path(name).expanduser()
        if path.suffix in _YAML:
            if not path.is_file():
                raise ConfigError(f"{name} does not exist; give the path of a YAML task or a name that lm-eval knows")
            return self._from_file(path, name)
        for with_defaults in (False, True):
            entry = self._manager(with_defaults).task_index.get(name)
            if entry is not None:
                return self._from_entry(entry, with_defaults)
        near = difflib.get_close_matches(name, self._manager(True).all_tasks, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "give one that lm-eval knows, or the path of a YAML file"
        )
        raise ConfigError(f"task {name!r} is not known; {hint}")

    def _manager(self, with_defaults: bool) -> Any:
        if with_defaults not in self._managers:
            with silence_lm_eval():
                self._managers[with_defaults] = require("lm_eval.tasks", "eval").TaskManager(
                    include_path=None if self._include_path is None else str(self._include_path),
                    include_defaults=with_defaults,
                )
        return self._managers[with_defaults]

    def _from_entry(self, entry: Any, with_defaults: bool) -> list[Any]:
        if entry.kind.name == "TASK" and entry.yaml_path is not None:
            return self._from_file(entry.yaml_path, entry.name)
        if entry.kind.name == "TAG":
            index = self._manager(with_defaults).task_index
            return [task for name in sorted(entry.tags) for task in self._from_entry(index[name], with_defaults)]
        return self._load(entry.name, entry.name, with_defaults)

    def _from_file(self, path: Path, name: str) -> list[Any]:
        settings = _read(path, name, resolve=False)
        if "group" in settings:
            return self._load(str(path), name, True)  # it may name any other task
        if settings.get("unsafe_code") and not self._confirmed:  # before functions that it names are imported
            raise ConfigError(_unsafe(name))
        settings = _read(path, name, resolve=True)
        for key in ("tag", "task_list"):
            settings.pop(key, None)
        return self._load(_find_files(settings, path.parent), name, False)

    def _load(self, spec: Any, name: str, with_defaults: bool) -> list[Any]:
        """Build by lm-eval; all that can fail there is told in one line."""
        try:
            with silence_lm_eval():
                tasks = list(self._manager(with_defaults).load([spec])["tasks"].values())
        except EnsemblerError:
            raise
        except Exception as error:  # data sets, templates and functions of the task's authors
            for frame, _ in walk_tb(error.__traceback__):
                _check_splits(frame.f_locals.get("self"))
                if isinstance(error, IndexError) and isinstance(choices := frame.f_locals.get("test_choice"), list):
                    answer = frame.f_locals.get("test_target")  # of the first document, which lm-eval tries
                    raise ConfigError(
                        f"task {name}: the right answer {answer!r} of its first document is no index of the choices "
                        f"{choices}; mend its data or its doc_to_target"
                    ) from error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"task {name} could not be loaded: {reason[:300]}; check its YAML file and its data{_fields(error)}"
            ) from error
        for task in tasks:
            self._check(task)
        return tasks

    def _check(self, task: Any) -> None:
        _check_splits(task)
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"task {task.task_name} shows pictures or sounds; give a task of texts alone")
        functions = getattr(task, "_metric_fn_list", {})
        if unknown := [name for name in functions if functions[name] is None and not task.config.process_results]:
            raise ConfigError(f"metric {unknown[0]} of task {task.task_name} is not known to lm-eval; name another")
        if getattr(task, "UNSAFE_CODE", False) and not self._confirmed:
            raise ConfigError(_unsafe(task.task_name))


def _check_splits(task: Any) -> None:
    """Raise ConfigError where a task of lm-eval's names a split that its data lack; let anything else pass."""
    data, config = getattr(task, "dataset", None), cast("Any", getattr(task, "config", None))
    for key in ("test_split", "validation_split", "training_split", "fewshot_split"):
        split = getattr(config, key, None)
        if isinstance(data, Mapping) and split is not None and split not in data:
            raise ConfigError(
                f"task {config.task} has {key}: {split}, which its data lack; give one of {', '.join(data)}"
            )


def _fields(error: Exception) -> str:
    """The fields of the document in which a template of lm-eval's was not filled, where it was that which failed."""
    found = [frame.f_locals.get("doc") for frame, _ in walk_tb(error.__traceback__)]
    names = [", ".join(doc) for doc in found if isinstance(doc, dict)]
    return f", which has the fields {names[-1]}" if names else ""


def _unsafe(name: str) -> str:
    return (
        f"task {name} runs code that the model wrote, with all that you may do on this machine; run it in a container, "
        "and add --confirm-run-unsafe-code"
    )


def _read(path: Path, name: str, *, resolve: bool) -> dict[str, Any]:
    """The settings of a YAML file, those that it includes among them; functions as functions, or as their paths."""
    try:
        settings: dict[str, Any] = require("lm_eval.tasks._yaml_loader", "eval").load_yaml(path, resolve_func=resolve)
    except EnsemblerError:
        raise
    except Exception as error:  # YAML itself, a file that is included, a Python file that it names
        if "HF_ALLOW_CODE_EVAL" in str(error):
            raise ConfigError(
                f"{name} runs code by Hugging Face's code_eval; allow it: HF_ALLOW_CODE_EVAL=1"
            ) from error
        raise ConfigError(f"{name} cannot be read as a task: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(settings.get("task"), str) and "group" not in settings:
        raise ConfigError(f"{path} names no task; expected 'task: NAME' in it")
    return settings


def _find_files(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a task, the local files of its data set as absolute paths if they lie in `folder`."""
    data = settings.get("dataset_kwargs")
    if not isinstance(data, dict) or "data_files" not in data:
        return settings
    return {**settings, "dataset_kwargs": {**data, "data_files": _find(data["data_files"], folder)}}


def _find(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _find(each, folder) for split, each in files.items()}
    if isinstance(files, list):
        return [_find(each, folder) for each in files]
    return str((folder / files).resolve()) if (folder / files).exists() else files
