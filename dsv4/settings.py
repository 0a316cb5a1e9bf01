"""Settings on top of settings: nested frozen dataclasses changed by YAML files and by `a.b=value` overrides.

Text means what the field's type makes of it, and nothing else: YAML is read by the rules of YAML 1.2 (`1:03` is no
number of seconds, `no` no truth value, `010` no octal), and an override is the text after its first `=`. Unknown keys
name the nearest known one; nothing is guessed, dropped or given twice.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

from dsv4.errors import UserError, nearest, shown
from dsv4.files import read_text, reason_of

_WHOLE = re.compile(r"[-+]?[0-9]{1,400}")
_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"


def merge(config: Any, changes: dict[str, Any], where: str = "") -> Any:
    """`config` (a nested frozen dataclass) with nested `changes`; UserError for unknown keys and wrong types."""
    known = {f.name: f.type for f in fields(config)}
    new: dict[str, Any] = {}
    for key, value in changes.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UserError(f"unknown configuration key {name!r}{_hint(config, str(key), where)}")
        new[key] = _converted(getattr(config, key), known[key], value, name)
    return replace(config, **new)


def read_overrides(config: Any, overrides: Iterable[str]) -> dict[str, Any]:
    """Nested changes from `optim.lr=3e-4`-style texts, each read as the type of the field that it names."""
    changes: dict[str, Any] = {}
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            raise UserError(f"override {shown(item)} is not of the form key=value, such as optim.lr=3e-4")
        path = path.strip()
        *parents, leaf = path.split(".")
        at, owner = changes, config
        for depth, key in enumerate(parents):
            name = ".".join(parents[: depth + 1])
            owner = _inside(owner, key, name)
            if not is_dataclass(owner):
                raise UserError(f"{name} is a single value: write {name}=value, not {path}=value")
            at = at.setdefault(key, {})
            assert isinstance(at, dict)
        if leaf in at:
            raise UserError(f"{path} is given twice: give it once")
        at[leaf] = _read(_inside(owner, leaf, path, optional=True), text, path)
    return changes


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; UserError if it cannot be read or holds anything else."""
    text = read_text(path, "the settings", "give a YAML file of run settings")
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML ({reason_of(error)}): mend it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings: write key: value lines such as those of a run's config.yaml")
    return values


def write_yaml(values: dict[str, Any]) -> str:
    """Plain nested values as YAML that `read_yaml` reads back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flat(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """("optim.lr", value) of every single value in nested dicts."""
    for key, value in config.items():
        name = f"{where}{key}"
        if isinstance(value, dict):
            yield from flat(value, f"{name}.")
        else:
            yield name, value


# --- types -----------------------------------------------------------------------------------------------------------


def _converted(old: Any, kind: Any, value: Any, name: str) -> Any:
    """`value` as the field's type, without guessing."""
    if is_dataclass(old):
        if not isinstance(value, dict):
            raise UserError(
                f"{name}={shown(value)} must be a group of settings, such as {name}.{fields(old)[0].name}=..."
            )
        return merge(old, value, name)
    value = tuple(value) if isinstance(value, list) and (isinstance(old, tuple) or kind is not type(old)) else value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if kind is str and value is None:
        return ""
    if isinstance(kind, UnionType):
        if value is None or type(value) in (int, float, str, bool, tuple):
            return value  # which of its types may be what is for the owner to judge
    elif type(value) is type(old):
        return value
    raise UserError(f"{name}={shown(value)} must be of type {type(old).__name__}, such as {old!r}")


def _read(kind_and_old: tuple[Any, Any] | None, text: str, name: str) -> Any:
    """The value that a text means for a field; what fits no type is left as text, for `merge` to refuse by name."""
    if kind_and_old is None:
        return text
    kind, old = kind_and_old
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is int and _WHOLE.fullmatch(text.strip()):
        return int(text)
    if isinstance(old, tuple) or isinstance(kind, UnionType):
        listed = isinstance(old, tuple) and text.lstrip().startswith("[")  # as in a file: its groups need no quotes
        try:
            value = yaml.load(text, Loader=_Loader) if listed else json.loads(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            return text
        return tuple(value) if isinstance(value, list) else value
    if is_dataclass(old):
        raise UserError(f"{name}={shown(text)} must be a group of settings, such as {name}.{fields(old)[0].name}=...")
    return text


def _inside(owner: Any, key: str, name: str, *, optional: bool = False) -> Any:
    """The value of a field; with `optional` its (type, value), or None for a name that only `merge` may refuse."""
    kinds = {f.name: f.type for f in fields(owner)}
    if optional:
        return (kinds[key], getattr(owner, key)) if key in kinds else None
    if key not in kinds:
        where = name.rpartition(".")[0]
        raise UserError(f"unknown configuration key {name!r}{_hint(owner, key, where)}")
    return getattr(owner, key)


def _hint(owner: Any, key: str, where: str) -> str:
    """What may have been meant: a neighbour, or the same name in another group."""
    names = [f.name for f in fields(owner)]
    deeper = [
        f"{group.name}.{f.name}"
        for group in fields(owner)
        if is_dataclass(getattr(owner, group.name))
        for f in fields(getattr(owner, group.name))
        if f.name == key
    ]
    if deeper and not where:
        return f"; did you mean {deeper[0]!r}?"
    return nearest(key, names) or f"; known here: {', '.join(names)}"


# --- YAML 1.2 --------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, plain decimal numbers, no aliases, no key twice."""

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*name), which settings have no use for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool | None) or name in seen:
                raise yaml.YAMLError(f"the key {shown(name)} stands there twice or is no name")
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either version of YAML would read as something else."""

    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}


_SIGNS = list("-+.0123456789")
for _kind, _pattern, _starts in (
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", re.compile(rf"(?:{_WHOLE.pattern})\Z"), _SIGNS),
    ("float", re.compile(rf"(?:{_NUMBER})\Z"), _SIGNS),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _starts)


def _whole(loader: _Loader, node: Any) -> int:
    return int(loader.construct_scalar(node))


def _float(loader: _Loader, node: Any) -> float:
    return float(re.sub(r"\.(inf|nan)", r"\1", str(loader.construct_scalar(node)).lower()))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
