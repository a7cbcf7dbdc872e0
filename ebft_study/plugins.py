"""Plug-ins: functions and classes of users that a study file names, by import path or by the name of an entry point.

    verifier: my_package.rewards:short        an import path, `package.module:name`
    verifier: short                           an entry point of that name in the group `ebft_study.plugins`

Modules are looked for where Python finds them, and then in the folder of the study file. Only what runs a study imports
them; what reads one (`status`, `report`, `compare`, `bundle`) never does. `docs/plugins.md` has the kinds.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from ebft_study.errors import ConfigError, EbftError, one_line

GROUP = "ebft_study.plugins"
"""The group of entry points."""
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
_NAME = re.compile(r"[A-Za-z][\w-]*")

_searched: list[str] = []
"""The folder of the study file, if any."""
_added: list[str] = []
"""The same, if this module has put it on `sys.path`."""
_expected: dict[str, str] = {}
"""Import path -> fingerprint that the study has recorded."""
_imported: dict[str, str] = {}
"""Module -> fingerprint of its files when this process imported it."""


# --- names -----------------------------------------------------------------------------------------------------


def is_path(name: object) -> bool:
    """Whether a name is an import path, `package.module:name`."""
    return isinstance(name, str) and _PATH.fullmatch(name) is not None


def name_of(path: str) -> str:
    """The name of a function or class without where it is: `package.module:Outer.name` -> `name`."""
    return path.rpartition(":")[2].rpartition(".")[2]


def expanded(name: str) -> str:
    """The import path behind the name of an entry point; any other name as it is. Imports nothing.

    Raises:
        ValueError: packages disagree about what the name means.
    """
    if not _NAME.fullmatch(name):
        return name
    paths = {f"{point.module}:{point.attr}" for point in importlib.metadata.entry_points(group=GROUP, name=name)}
    if len(paths) > 1:
        raise ValueError(f"is a plug-in of several packages: {', '.join(sorted(paths))}. Use one of these paths")
    return paths.pop() if paths else name


def choice(names: Sequence[str]) -> Callable[[str], str]:
    """A validator of settings that are one of `names`, or a plug-in."""

    def validate(name: str) -> str:
        path = name if name in names else expanded(name)
        if path in names or is_path(path):
            return path
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        nearest = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"is no known one. {nearest}Use {', '.join(names)}, or package.module:name for one of your own"
        )

    return validate


def as_paths(names: Iterable[str]) -> tuple[str, ...]:
    """A validator of settings that list plug-ins."""
    paths = tuple(map(expanded, names))
    for path in paths:
        if not is_path(path):
            raise ValueError(f"{path!r} is no import path, and no package has a plug-in of this name. {_FORM}")
    return paths


_FORM = "Write package.module:name"


# --- importing -------------------------------------------------------------------------------------------------


def search_in(folder: str | Path | None, expected: Mapping[str, str] | None = None) -> None:
    """Find modules in this folder, too, after those that are installed; an earlier call's folder is left.

    Args:
        folder: that of the study file; None: nowhere else.
        expected: import path -> fingerprint of what the study began with: `load` refuses others.
    """
    for before in set(_added) & set(sys.path):
        sys.path.remove(before)
    _added.clear()
    _searched[:] = [] if folder is None else [str(folder)]
    _expected.clear()
    _expected.update(expected or {})
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
        _added.append(str(folder))
    importlib.invalidate_caches()


def load(path: str, *, key: str) -> Any:
    """The object that a setting names.

    Args:
        key: the setting, for errors.

    Raises:
        ConfigError: there is no such module or name, it is not callable, or it is not what the study began with.
    """
    module, _, name = path.partition(":")
    if not is_path(path):
        raise refused(key, path, "is no import path", _FORM)
    imported = _module(module, key, path)
    try:
        target = functools.reduce(getattr, name.split("."), imported)
    except AttributeError:
        close = difflib.get_close_matches(name, [each for each in dir(imported) if each[0] != "_"], n=1, cutoff=0.5)
        remedy = f"Did you mean {close[0]!r}?" if close else "Repair the name"
        raise refused(key, path, f"{module} has no {name}", remedy) from None
    if not callable(target):
        raise refused(key, path, f"is no function and no class, but {type(target).__name__}", "Name one")
    if path in _expected and _expected[path] != fingerprint(path):
        rule = f"its code is not what the study began with ({_expected[path][:8]} -> {fingerprint(path)[:8]})"
        raise refused(key, path, rule, "Put it back, or resume the study with --accept-changes")
    return target


def _module(module: str, key: str, path: str) -> ModuleType:
    _check_origin(module.partition(".")[0], key, path)
    if module not in sys.modules:
        _imported.pop(module, None)
    try:
        imported = importlib.import_module(module)
    except EbftError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            where = f", nor in {_searched[0]}" if _searched else ""
            rule = f"there is no module {error.name!r} where Python looks{where}"
            remedy = "Put it into the folder of the study file, install it, or put its folder on PYTHONPATH"
            raise refused(key, path, rule, remedy) from None
        raise refused(key, path, f"its module imports {error.name!r}, which is missing", "Install it") from error
    except Exception as error:
        rule = f"cannot be imported ({type(error).__name__}: {one_line(error)})"
        raise refused(key, path, rule, "Repair its module") from error
    now = _digest(imported)
    if _imported.setdefault(module, now) != now:
        raise refused(key, path, "its files have changed since this process imported them", "Restart Python")
    return imported


def _check_origin(top: str, key: str, path: str) -> None:
    """Refuse a module that this process has imported from elsewhere under the same name, such as for another study."""
    before = getattr(sys.modules.get(top), "__file__", None)
    spec = PathFinder.find_spec(top) if before else None
    if before and spec and spec.origin and Path(spec.origin).resolve() != Path(before).resolve():
        rule = f"this process has imported another module {top!r} from {before}, and this one is {spec.origin}"
        raise refused(key, path, rule, "Restart Python, or rename it")


def call(path: str, *, key: str, options: Mapping[str, Any]) -> Any:
    """What the class, or factory, behind a path makes of options.

    Raises:
        ConfigError: see `load`; or it takes other options, or has raised an error.
    """
    target = load(path, key=key)
    check_arguments(target, path, key=key, options=options)
    try:
        return target(**options)
    except EbftError:
        raise
    except Exception as error:
        raise raised(key, path, error) from error


def seeded(path: str, *, key: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Options with a seed, if the plug-in takes one that they do not give."""
    try:
        takes_seed = "seed" in inspect.signature(load(path, key=key)).parameters
    except (TypeError, ValueError):  # of some that are written in C
        takes_seed = False
    return {**({"seed": seed} if takes_seed else {}), **options}


def check_arguments(
    target: Callable[..., Any], path: str, *, key: str, arguments: Sequence[str] = (), options: Mapping[str, Any]
) -> None:
    """Refuse a function that cannot be called with these arguments and options."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # of some that are written in C
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        called = ", ".join([*arguments, *(f"{name}={value!r}" for name, value in options.items())])
        rule = f"cannot be called as {path.rpartition(':')[2]}({called}): {one_line(error)}"
        raise refused(key, path, rule, f"Its arguments are {signature}") from None


def check_members(made: object, members: Iterable[str], path: str, *, key: str, what: str) -> None:
    """Refuse an object that lacks something that it is asked for."""
    missing = [name for name in members if not hasattr(made, name)]
    if missing:
        raise refused(key, path, f"it has made an object without {', '.join(missing)}", f"Make {what}")


def refused(key: str, path: str, rule: str, remedy: str) -> ConfigError:
    """The error for a plug-in that cannot be used."""
    return ConfigError(f"{key}={path!r}: {rule}. {remedy}")


def raised(key: str, path: str, error: BaseException) -> ConfigError:
    """The error for a plug-in that has raised one."""
    return refused(key, path, f"it has raised {type(error).__name__}: {one_line(error)}", "Repair it")


def folder_with(path: str) -> str | None:
    """The folder of `search_in`, if the module of a plug-in that was loaded is there."""
    file = Path(importlib.import_module(path.partition(":")[0]).__file__ or "/")
    return next((folder for folder in _searched if file.is_relative_to(folder)), None)


# --- what was used ---------------------------------------------------------------------------------------------


def fingerprint(path: str) -> str:
    """SHA-256 of the source of a plug-in that was loaded: of its module, or of all of the package that this is in."""
    return _digest(importlib.import_module(path.partition(":")[0]))


def _digest(module: ModuleType) -> str:
    top = sys.modules[module.__name__.partition(".")[0]]
    roots = [Path(root) for root in getattr(top, "__path__", ())]
    files = [(file.relative_to(root), file) for root in roots for file in sorted(root.rglob("*.py"))]
    if not roots and module.__file__:
        files = [(Path(Path(module.__file__).name), Path(module.__file__))]
    state = hashlib.sha256()
    for name, file in files:
        content = file.read_bytes()
        state.update(f"{name.as_posix()} {len(content)} ".encode() + content)
    return state.hexdigest()
