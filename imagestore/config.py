"""The operator's door: stores from configuration files, from a host's `ConfigOpts`, or from keyword arguments.

A file names its stores in ``[DEFAULT] enabled_backends`` and has a section for each. The form is that of Glance, and
Glance's option names are understood (`imagestore._options` says what each became), so a ``glance-api.conf`` loads:

.. code-block:: ini

    [DEFAULT]
    enabled_backends = local:file, cheap:s3
    [imagestore]
    default_backend = local
    [local]
    datadir = /var/lib/images
    [cheap]
    bucket = images

Nothing is guessed and nothing is switched off in silence: an option that is unknown, missing or wrong in a section
that is read is an error, and `check` tells all of them at once. A section may be absent if no option of its store is
required. Sections of other stores, services and libraries are not looked at. Of all values, errors and log lines
repeat only ids and types of stores.

An option may also come from the environment as ``OS_<SECTION>__<OPTION>``, both in capitals, which wins over files.
``$name`` and ``${section.name}`` stand for the value of another option that is read; ``$$`` is a dollar sign.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from oslo_config import cfg, iniparser, types

from imagestore._config_files import CONFIG_FILES, CONFIG_VARIABLE, default_config_files
from imagestore._models import Limits, Observer, Retry, Timeouts
from imagestore._options import OLD_OPTIONS, OldOption, old_options
from imagestore._pool import Engine
from imagestore._store import Store
from imagestore._stores import Stores
from imagestore.driver import Driver, Options
from imagestore.errors import ConfigurationError, DriverNotFound, InvalidOption, MissingDependency, StoreError
from imagestore.formats import CONTAINER_FORMATS, DISK_FORMATS, Policy

__all__ = ["Problem", "Size", "available_drivers", "check", "list_opts", "load_driver", "load_stores", "open_store"]

DRIVER_GROUP: Final = "imagestore.drivers"

_log = logging.getLogger("imagestore")

_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE: Final = re.compile(r"(\d+)\s*([A-Za-z]*)")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED: Final = frozenset({"default", "imagestore", "glance_store", "backend_defaults"})


class Size(types.ConfigType):
    """An option type: bytes, with or without a unit: ``kB MB GB TB`` of 1000, ``KiB MiB GiB TiB`` of 1024."""

    def __init__(self) -> None:
        super().__init__(type_name="size such as 512MiB, or bytes")

    def __call__(self, value: Any) -> int:
        """``value`` in bytes. Raises ValueError."""
        match = _SIZE.fullmatch(str(value).strip())
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None or int(match[1]) == 0:
            raise ValueError("not a size")
        return int(match[1]) * unit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size)

    def __hash__(self) -> int:
        return hash(Size)

    def __repr__(self) -> str:
        return "Size"

    def _formatter(self, value: Any) -> str:
        for unit in ("TiB", "GiB", "MiB", "TB", "GB", "MB", "KiB", "kB"):
            count, rest = divmod(int(value), _UNITS[unit.lower()])
            if count and not rest:
                return f"{count}{unit}"
        return str(value)


_ENABLED: Final = cfg.StrOpt(
    "enabled_backends",
    help="The stores, as id:type pairs with commas between them. Each has a section named by its id. "
    "`imagestore stores` lists the installed types.",
    sample_default="local:file",
)
_DEFAULT: Final = cfg.StrOpt(
    "default_backend", help="Id of the store that is used where none is named. A lone store needs no naming."
)
_LIMITS: Final = (
    cfg.Opt("memory", type=Size(), default=Limits().memory, help="Image data that one transfer may hold in memory."),
    cfg.Opt(
        "memory_total",
        type=Size(),
        default=Limits().memory_total,
        help="Image data that all transfers of the process together may hold in memory.",
    ),
    cfg.IntOpt(
        "workers",
        min=1,
        max=1024,
        default=Limits().workers,
        help="Threads that write, read and hash: one pool of so many per store, and one for all digests.",
    ),
    cfg.IntOpt(
        "max_transfers",
        min=1,
        help="How many adds and downloads may run at once in one store. Unset is no limit.",
    ),
    cfg.Opt("max_size", type=Size(), default=Limits().max_size, help="The largest image that is accepted."),
)
_RETRY: Final = (
    cfg.IntOpt(
        "retry_attempts", min=1, default=Retry().attempts, help="How often a call that fails for a moment is tried."
    ),
    cfg.FloatOpt("retry_first", min=0, default=Retry().first, help="Seconds before the second attempt."),
    cfg.FloatOpt("retry_longest", min=0, default=Retry().longest, help="The longest wait between attempts in seconds."),
    cfg.FloatOpt(
        "retry_total",
        min=0,
        default=Retry().total,
        help="Seconds without progress after which no further attempt is begun.",
    ),
)
_TIMEOUTS: Final = (
    cfg.FloatOpt("timeout_connect", min=0.001, default=Timeouts().connect, help="Seconds for a connection to be made."),
    cfg.FloatOpt(
        "timeout_stall",
        min=0.001,
        default=Timeouts().stall,
        help="Seconds without any answer after which a backend counts as stalled. A slow transfer is never cut.",
    ),
    cfg.FloatOpt(
        "timeout_abort",
        min=0.001,
        default=Timeouts().abort,
        help="Seconds for all attempts together to take a failed upload back.",
    ),
)
_POLICY: Final = (
    cfg.StrOpt(
        "policy_mode",
        default=Policy().mode,
        choices=[
            ("off", "nothing is looked at"),
            ("warn", "what is found is told"),
            ("enforce", "what is fatal refuses the image"),
        ],
        help="What becomes of an image that is not what it was declared to be, or not safe.",
    ),
    cfg.ListOpt(
        "policy_disk_formats",
        item_type=types.String(choices=DISK_FORMATS),
        default=list(Policy().disk_formats),
        help="What may be declared as disk format.",
    ),
    cfg.ListOpt(
        "policy_container_formats",
        item_type=types.String(choices=CONTAINER_FORMATS),
        default=list(Policy().container_formats),
        help="What may be declared as container format.",
    ),
    cfg.ListOpt(
        "policy_ova_disk_formats",
        item_type=types.String(choices=DISK_FORMATS),
        default=list(Policy().ova_disk_formats),
        help="What the disks of an OVA may be.",
    ),
    cfg.StrOpt(
        "policy_compressed",
        default=Policy().compressed,
        choices=["full", "head", "opaque"],
        help="Whether compressed contents are unpacked in passing to look at them: all, the first MiB, or not.",
    ),
    cfg.Opt(
        "policy_max_virtual_size",
        type=Size(),
        help="The largest disk that a machine may see. Unset is no limit.",
    ),
    cfg.IntOpt(
        "policy_max_members", min=1, default=Policy().max_members, help="Members that a container image may have."
    ),
    cfg.IntOpt(
        "policy_max_ratio",
        min=1,
        default=Policy().max_ratio,
        help="How many times its own size compressed contents may unpack to.",
    ),
    cfg.DictOpt(
        "policy_overrides",
        default={},
        help="Finding codes, or families such as qcow2.*, each with refuse or allow: qcow2.encrypted:refuse",
    ),
)
_GENERAL: Final = (_DEFAULT, *_LIMITS, *_RETRY, *_TIMEOUTS, *_POLICY)
_COMMON: Final = (
    cfg.StrOpt("description", default="", help="What the store is, for humans."),
    cfg.IntOpt("weight", default=0, help="Of several stores with an image, the one of the largest weight is read."),
)


def load_stores(
    *config_files: str | os.PathLike[str],
    conf: cfg.ConfigOpts | None = None,
    limits: Limits | None = None,
    retry: Retry | None = None,
    timeouts: Timeouts | None = None,
    observer: Observer | None = None,
    policy: Policy | None = None,
) -> Stores:
    """The stores of configuration files, not yet connected.

    Args:
        config_files: files, or directories whose ``*.conf`` are read in order of their names; later ones win. None
            at all: those that the environment variable ``IMAGESTORE_CONFIG`` names (with colons between them), or
            the first of ``~/.config/imagestore/imagestore.conf`` and ``/etc/imagestore/imagestore.conf``.
        conf: in place of files, the `ConfigOpts` of a host that has parsed its own. Our options are registered in
            it; oslo.config's global object is never touched unless it is given here.
        limits: in place of what ``[imagestore]`` says.
        retry: likewise.
        timeouts: likewise.
        observer: gets the events of all transfers.
        policy: in place of what ``[imagestore]`` says: which findings refuse an image whose format is declared.

    Raises:
        InvalidOption: an option is unknown, missing or wrong, or is given by its old and its new name.
        DriverNotFound: no driver of an enabled type is installed, or two are.
        MissingDependency: a driver's module can't be imported.
        ConfigurationError: a file can't be read, no store is enabled, or there are faults of several kinds.
    """
    if conf is not None and config_files:
        raise ConfigurationError("give configuration files or a ConfigOpts, not both")
    problems: list[Problem] = []
    plan = _plan(config_files, conf, problems, limits=limits, retry=retry, timeouts=timeouts, policy=policy)
    _raise(problems)
    _say(plan.notes)
    engine = Engine(plan.limits)
    stores = [
        Store(
            store.driver,
            name=store.name,
            limits=plan.limits,
            retry=plan.retry,
            timeouts=plan.timeouts,
            observer=observer,
            policy=plan.policy,
            weight=store.weight,
            description=store.description,
            engine=engine,
        )
        for store in plan.stores
    ]
    return Stores(stores, default=plan.default, engine=engine)


def open_store(
    driver: str,
    name: str | None = None,
    *,
    limits: Limits | None = None,
    retry: Retry | None = None,
    timeouts: Timeouts | None = None,
    observer: Observer | None = None,
    policy: Policy | None = None,
    **options: Any,
) -> Store:
    """One store without any file, not yet connected: ``open_store("file", datadir="/var/lib/images")``.

    ``options`` are those of a section in a file, checked in the same way; None is as if not given. Values are taken
    as they are: a ``$`` in them has no meaning. ``name`` is the driver's type if it is not given.

    Raises what `load_stores` raises.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    limits, retry, timeouts = limits or Limits(), retry or Retry(), timeouts or Timeouts()
    sections = [_Keywords(driver, options)]
    store = _plan_store(name or driver, load_driver(driver), sections, limits, timeouts, problems, notes)
    _raise(problems)
    assert store is not None
    _say(notes)
    return Store(
        store.driver,
        name=store.name,
        limits=limits,
        retry=retry,
        timeouts=timeouts,
        observer=observer,
        policy=policy,
        weight=store.weight,
        description=store.description,
    )


def check(config_files: Iterable[str | os.PathLike[str]] = ()) -> list[Problem]:
    """Every fault of configuration files, in the order of the files' stores; an empty list is a good configuration.

    Takes what `load_stores` takes, and connects to nothing. As there, old options that do nothing any more are no
    faults; they are told in the log.
    """
    problems: list[Problem] = []
    _say(_plan(tuple(config_files), None, problems).notes)
    return list(dict.fromkeys(problems))


def list_opts() -> list[tuple[str | cfg.OptGroup, list[cfg.Opt]]]:
    """All options, for ``oslo-config-generator --namespace imagestore``: a sample section per installed driver."""
    sections: list[tuple[str | cfg.OptGroup, list[cfg.Opt]]] = [("DEFAULT", [_ENABLED]), ("imagestore", list(_GENERAL))]
    for name in available_drivers():
        try:
            driver = load_driver(name)
        except ConfigurationError as error:
            _log.warning("no sample for driver %s: %s", name, error)
            continue
        if driver.name == name:
            sample = cfg.OptGroup(f"store_{name}", help=f"A store of the type {name}; the section is named by its id.")
            sections.append((sample, [*_COMMON, *driver.options]))
    return sections


def available_drivers() -> dict[str, str]:
    """The driver types that are installed, each with the package that it comes from. Loads none of them."""
    found: dict[str, str] = {}
    entries = importlib.metadata.entry_points(group=DRIVER_GROUP)
    for name, package in sorted((entry.name, _package(entry)) for entry in entries):
        found[name] = f"{found[name]}, {package}" if name in found else package
    return found


def load_driver(name: str) -> type[Driver]:
    """The class of the driver type ``name``, from the entry-point group ``imagestore.drivers``.

    Raises:
        DriverNotFound: there is none, or there are two, or it is no driver of this version of the contract.
        MissingDependency: its module can't be imported.
    """
    entries = {entry.value: entry for entry in importlib.metadata.entry_points(group=DRIVER_GROUP, name=name)}
    if not entries:
        installed = available_drivers()
        raise DriverNotFound(
            f"no driver of the type {name!r} is installed{_near(name, installed)} "
            f"(installed: {', '.join(installed) or 'none'})"
        )
    if len(entries) > 1:
        packages = " and ".join(sorted({_package(entry) for entry in entries.values()}))
        raise DriverNotFound(f"the driver type {name!r} is claimed by {packages}; remove all of them but one")
    (entry,) = entries.values()
    try:
        driver = _plugin(entry)
    except ConfigurationError:
        raise
    except ImportError as error:
        raise MissingDependency(f"the driver {name!r} of {_package(entry)} can't be imported: {error}") from error
    except Exception as error:
        kind = type(error).__name__
        raise DriverNotFound(f"the driver {name!r} of {_package(entry)} can't be loaded ({kind})") from error
    if not (isinstance(driver, type) and issubclass(driver, Driver)):
        raise DriverNotFound(f"{entry.value} of {_package(entry)} is not a subclass of imagestore.driver.Driver")
    if driver.api != Driver.api:
        raise DriverNotFound(
            f"the driver {name!r} of {_package(entry)} is written for version {driver.api} of the driver contract, "
            f"and this imagestore has version {Driver.api}"
        )
    return driver


def _plugin(entry: importlib.metadata.EntryPoint) -> object:
    from stevedore.driver import DriverManager
    from stevedore.exception import NoMatches

    def failed(_manager: object, _plugin: object, error: BaseException) -> None:
        raise error

    try:
        return DriverManager(
            DRIVER_GROUP, entry.name, on_load_failure_callback=failed, on_missing_entrypoints_callback=None
        ).driver
    except NoMatches:
        # stevedore remembers entry points on disk, and may not have noticed a package installed a moment ago.
        return entry.load()


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A fault in a configuration.

    Attributes:
        message: what is wrong and what to do; never a value.
        file, line, section, option: where, as far as it has a place.
        error: the class of the error that `load_stores` raises for it.
    """

    message: str
    file: str | None = None
    line: int | None = None
    section: str | None = None
    option: str | None = None
    error: type[ConfigurationError] = InvalidOption
    cause: Exception | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        place = ""
        if self.file:
            place = f"{self.file}:{self.line}: " if self.line else f"{self.file}: "
        where = " ".join(
            part for part in (self.section and f"[{self.section}]", self.option and f"option {self.option}") if part
        )
        return f"{place}{where}{' ' if self.option else ': ' if where else ''}{self.message}"


def _raise(problems: list[Problem]) -> None:
    if not problems:
        return
    problems = list(dict.fromkeys(problems))
    kinds = {problem.error for problem in problems}
    kind = kinds.pop() if len(kinds) == 1 else ConfigurationError
    causes = [problem.cause for problem in problems if problem.cause]
    if len(problems) == 1:
        raise kind(str(problems[0])) from (causes[0] if causes else None)
    lines = "".join(f"\n- {problem}" for problem in problems)
    raise kind(f"the configuration has {len(problems)} faults:{lines}") from (causes[0] if causes else None)


def _say(notes: list[str]) -> None:
    for note in dict.fromkeys(notes):
        _log.warning("%s", note)


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _expected(kind: Any) -> str:
    """What a value must be, told without the value that it is not."""
    if choices := getattr(kind, "choices", None):
        return f"must be one of {', '.join(map(str, choices))}"
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    span = "".join(f" {word} {bound}" for word, bound in (("not below", low), ("not above", high)) if bound is not None)
    pattern = getattr(kind, "regex", None)
    match = f" that matches {pattern.pattern}" if pattern is not None else ""
    longest = getattr(kind, "max_length", None)
    most = f" of at most {longest} characters" if longest else ""
    name = getattr(kind, "type_name", "valid value")
    return f"must be {'an' if name[0] in 'aeiou' else 'a'} {name}{span}{match}{most}"


class _BadValue(Exception):
    """A value that can't be had; the text says why and does not repeat it."""


def _typed(option: cfg.Opt, value: Any) -> Any:
    """``value`` as the type of ``option`` has it. Raises `_BadValue`."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Mapping) and isinstance(option.type, types.String):
        # What a host registered as a dictionary is text here: enabled_backends.
        value = ", ".join(f"{key}:{each}" for key, each in value.items())
    if option.multi:
        value = list(value) if isinstance(value, (list, tuple)) else [value]
    try:
        return [option.type(each) for each in value] if option.multi else option.type(value)
    except (ValueError, TypeError):
        raise _BadValue(_expected(option.type)) from None


def _converted(old: OldOption, value: Any) -> Any:
    """The value of an old option as our option has it; None if it means "not set". Raises `_BadValue`."""
    if old.convert is None:
        return value
    try:
        return old.convert(str(value))
    except ValueError as error:
        raise _BadValue(str(error)) from None


class _Keywords:
    """Options given as keyword arguments."""

    def __init__(self, driver: str, options: Mapping[str, Any]) -> None:
        self._call = f"open_store({driver!r})"
        self._options = {key: value for key, value in options.items() if value is not None}

    def written(self) -> Iterator[tuple[str, str | None, int | None]]:
        """What is given there: option, file, line."""
        return ((key, None, None) for key in self._options)

    def fetch(self, option: cfg.Opt) -> tuple[bool, Any]:
        """Whether ``option`` is given, and its value or default. Raises `_BadValue`."""
        if option.dest in self._options:
            return True, _typed(option, self._options[option.dest])
        return False, None if option.default is None else _typed(option, option.default)

    def old(self, name: str, *, multi: bool) -> Any:
        """The value of an option by its old name, before any conversion; None if it is not given."""
        return self._options.get(name)

    def problem(self, option: str | None, message: str) -> Problem:
        return Problem(message=f"{self._call}: option {option} {message}" if option else f"{self._call}: {message}")


class _Section:
    """A section of a `ConfigOpts`, with the verbs of `_Keywords`."""

    def __init__(self, name: str, conf: cfg.ConfigOpts, files: _Files) -> None:
        self.name = name
        self._conf = conf
        self._files = files

    def written(self) -> Iterator[tuple[str, str | None, int | None]]:
        return self._files.written(self.name)

    def fetch(self, option: cfg.Opt) -> tuple[bool, Any]:
        group = None if self.name == "DEFAULT" else self.name
        try:
            self._conf.register_opt(option, group)
            ours = True
        except cfg.DuplicateOptError:
            # The host, or another driver, has registered that name with another type: its value serves as well.
            ours = False
        try:
            location = self._conf.get_location(option.dest, group)
            value = self._conf[option.dest] if group is None else self._conf[group][option.dest]
        except (cfg.NoSuchOptError, cfg.NoSuchGroupError, cfg.TemplateSubstitutionError, RecursionError):
            raise _BadValue(
                "refers with $ to an option that is not read here, or to itself; write $$ for a dollar sign"
            ) from None
        except ValueError:
            raise _BadValue(_expected(option.type)) from None
        where = location.location if location is not None else cfg.Locations.opt_default
        if option.multi and where is cfg.Locations.environment:
            raise _BadValue("takes several values, which the environment can't hold: write it in a file")
        given = where is not cfg.Locations.opt_default
        if not ours:
            value = _typed(option, value) if given else option.default
        return given, value

    def old(self, name: str, *, multi: bool) -> Any:
        # As text, whatever it means, because units differ and an empty text is "not set" in Glance's files.
        given, value = self.fetch((cfg.MultiStrOpt if multi else cfg.StrOpt)(name, secret=True))
        return value if given else None

    def problem(self, option: str | None, message: str) -> Problem:
        file, line = self._files.place(self.name, option)
        return Problem(message=message, file=file, line=line, section=self.name, option=option)


class _Defaults(_Section):
    """``[backend_defaults]``: options of all drivers in one section, some of one name but of different types."""

    def fetch(self, option: cfg.Opt) -> tuple[bool, Any]:
        text = (cfg.MultiStrOpt if option.multi else cfg.StrOpt)(option.dest, secret=True)
        given, value = super().fetch(text)
        return given, _typed(option, value) if given else None


class _Lines(iniparser.BaseParser):
    """Which options a file has, and where: oslo.config does not tell, and so can't say that one is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.options: list[tuple[str, str, int]] = []

    def new_section(self, section: str) -> None:
        self.sections.append(section)

    def assignment(self, key: str, value: list[str]) -> None:
        if not self.sections:
            raise self.parse_exc("an option stands before the first [section]", self.lineno - len(value), "")
        self.options.append((self.sections[-1], key, self.lineno - len(value)))


def _folded(section: str) -> str:
    """oslo.config makes no difference between capitals and small letters in sections, but for DEFAULT."""
    return section if section == "DEFAULT" else section.lower()


class _Files:
    """The configuration files, in the order in which they are read."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]], problems: list[Problem]) -> None:
        self.paths: list[str] = []
        self._sections: dict[str, list[tuple[str, str, int]]] = {}
        self._homes: dict[str, str] = {}
        for path in paths:
            place = Path(os.path.abspath(os.path.expanduser(path)))
            for file in sorted(place.glob("*.conf")) if place.is_dir() else [place]:
                self._read(str(file), problems)

    def _read(self, file: str, problems: list[Problem]) -> None:
        lines = _Lines()
        fault: str | None = None
        line: int | None = None
        try:
            # In the encoding of the locale, as oslo.config reads it again later.
            with open(file) as text:
                # The parser hands over an option at the line that follows it: let there always be one.
                lines.parse([*text, "\n"])
        except iniparser.ParseError as error:
            # Its text holds the line, and that may hold a password.
            fault, line = error.msg, error.lineno
        except OSError as error:
            fault = f"can't be read: {error.strerror}"
        except ValueError:
            fault = "is not text in the encoding of the locale"
        if fault is not None:
            problems.append(Problem(message=fault, file=file, line=line, error=ConfigurationError))
            return
        self.paths.append(file)
        for section in lines.sections:
            self._sections.setdefault(_folded(section), [])
            self._homes[_folded(section)] = file
        for section, key, number in lines.options:
            self._sections[_folded(section)].append((key, file, number))

    def __contains__(self, section: str) -> bool:
        return _folded(section) in self._sections

    def __iter__(self) -> Iterator[str]:
        return iter(self._sections)

    def written(self, section: str) -> Iterator[tuple[str, str | None, int | None]]:
        yield from self._sections.get(_folded(section), ())

    def place(self, section: str, option: str | None) -> tuple[str | None, int | None]:
        """File and line where ``option`` was last given; else the file of the section, or the only file."""
        for key, file, line in reversed(self._sections.get(_folded(section), [])):
            if key == option:
                return file, line
        return self._homes.get(_folded(section), self.paths[0] if len(self.paths) == 1 else None), None


def _host_files(conf: cfg.ConfigOpts) -> list[str]:
    """The files that a host's `ConfigOpts` was filled from; none if it was never called."""
    try:
        files = list(conf.config_file or [])
    except cfg.NoSuchOptError:
        return []
    folders = conf.config_dirs or getattr(conf, "default_config_dirs", None) or []
    return files + [folder for folder in folders if os.path.isdir(os.path.expanduser(folder))]


@dataclass(kw_only=True, slots=True)
class _StorePlan:
    name: str
    driver: Driver
    weight: int
    description: str


@dataclass(kw_only=True, slots=True)
class _Plan:
    limits: Limits
    retry: Retry
    timeouts: Timeouts
    policy: Policy | None = None
    default: str | None = None
    stores: list[_StorePlan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _plan(
    config_files: tuple[str | os.PathLike[str], ...],
    conf: cfg.ConfigOpts | None,
    problems: list[Problem],
    *,
    limits: Limits | None = None,
    retry: Retry | None = None,
    timeouts: Timeouts | None = None,
    policy: Policy | None = None,
) -> _Plan:
    """Read everything. What is wrong goes to ``problems``, and the rest is looked at all the same."""
    files, conf = _opened(config_files, conf, problems)
    general = _Section("imagestore", conf, files)
    _look_for_unknown(general, {option.dest for option in _GENERAL}, problems)
    values = {option.dest: _value(general, option, problems) for option in _GENERAL}
    plan = _Plan(
        limits=limits or _filled(Limits, "", values),
        retry=retry or _filled(Retry, "retry_", values),
        timeouts=timeouts or _filled(Timeouts, "timeout_", values),
    )
    try:
        plan.policy = policy or _filled(Policy, "policy_", values)
    except InvalidOption as error:
        problems.append(general.problem("policy_overrides", error.message))
    if any(problem.error is ConfigurationError for problem in problems):
        # A file could not be read: whatever seems to be missing may be in it.
        return plan
    backends = _enabled(conf, files, problems)
    plan.default = _default(values["default_backend"], [name for name, _ in backends], conf, files, problems)
    defaults = _Defaults("backend_defaults", conf, files)
    drivers = {kind: _driver(kind, files, problems) for kind in dict.fromkeys(kind for _, kind in backends)}
    for name, kind in backends:
        if driver := drivers[kind]:
            sections = [_Section(name, conf, files), defaults]
            store = _plan_store(name, driver, sections, plan.limits, plan.timeouts, problems, plan.notes)
            if store is not None:
                plan.stores.append(store)
            elif name not in files and (near := _near(name.lower(), files)):
                problems[-1] = replace(
                    problems[-1], message=f"{problems[-1].message} (there is no section [{name}]{near})"
                )
    return plan


def _opened(
    config_files: tuple[str | os.PathLike[str], ...], conf: cfg.ConfigOpts | None, problems: list[Problem]
) -> tuple[_Files, cfg.ConfigOpts]:
    if conf is not None:
        return _Files(_host_files(conf), problems), conf
    paths = config_files or default_config_files()
    files = _Files(paths, problems)
    if not files.paths and not problems:
        places = " or ".join(CONFIG_FILES)
        text = f"there is no configuration file: name one, or set {CONFIG_VARIABLE}, or write {places}"
        problems.append(Problem(message=text, error=ConfigurationError))
    conf = cfg.ConfigOpts()
    try:
        conf(args=[], project="imagestore", default_config_files=files.paths, default_config_dirs=[])
    except cfg.Error as error:
        # Its text may hold a line of the file.
        text = f"oslo.config can't read the configuration files ({type(error).__name__})"
        problems.append(Problem(message=text, error=ConfigurationError))
    return files, conf


def _filled(kind: type[Any], prefix: str, values: Mapping[str, Any]) -> Any:
    """``kind`` with the fields that were read; the others keep their defaults."""
    read = {name: values.get(prefix + name) for name in kind.__dataclass_fields__}
    given = {name: value for name, value in read.items() if value is not None}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _value(section: _Section, option: cfg.Opt, problems: list[Problem]) -> Any:
    try:
        value = section.fetch(option)[1]
        if isinstance(value, float) and not math.isfinite(value):
            raise _BadValue("must be a finite number")
    except _BadValue as fault:
        problems.append(section.problem(option.dest, str(fault)))
        return None
    return value


def parse_backends(text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The (id, type) pairs of ``enabled_backends``, and what is wrong with the rest."""
    pairs: list[tuple[str, str]] = []
    faults: list[str] = []
    # A value may go on in further lines, and a comma may end it.
    entries = [entry.strip() for entry in re.split(r",\s*\n|,|\n", text)]
    if not entries[-1]:
        entries.pop()
    for entry in entries:
        name, colon, kind = (part.strip() for part in entry.partition(":"))
        if not entry:
            faults.append("has an empty entry between two commas")
        elif not colon:
            faults.append(f"has the entry {entry!r}, which is not of the form id:type")
        elif not _NAME.fullmatch(name):
            faults.append(
                f"has the id {name!r}; an id is made of up to 100 letters, digits, dots, dashes and underscores, and "
                "begins with a letter or a digit"
            )
        elif name.lower() in _RESERVED:
            faults.append(f"has the id {name!r}, but the section of that name has a meaning of its own")
        elif not _NAME.fullmatch(kind):
            faults.append(f"has no type, or an impossible one, for {name!r}; write {name}:file, for example")
        elif name.lower() in {other.lower() for other, _ in pairs}:
            faults.append(f"has the id {name!r} twice (capital and small letters count as the same)")
        else:
            pairs.append((name, kind))
    return pairs, faults


def _enabled(conf: cfg.ConfigOpts, files: _Files, problems: list[Problem]) -> list[tuple[str, str]]:
    section = _Section("DEFAULT", conf, files)
    faults: list[Problem] = []
    value = _value(section, _ENABLED, faults)
    pairs: list[tuple[str, str]] = []
    if value and value.strip():
        pairs, texts = parse_backends(value)
        faults += [section.problem("enabled_backends", text) for text in texts]
    elif not faults:
        faults.append(_nothing_enabled(section, files))
    problems += faults
    return pairs


def _nothing_enabled(section: _Section, files: _Files) -> Problem:
    old = {key for key, _, _ in files.written("glance_store")}
    kinds = [kind for kind, options in OLD_OPTIONS.items() if old & {option.name for option in options}]
    if not kinds and not old & {"stores", "default_store"}:
        return section.problem("enabled_backends", "names no store; write enabled_backends = local:file, for example")
    kinds = kinds or ["file"]
    return Problem(
        message="is missing, and [glance_store] has the old form with one store of each type. Write enabled_backends "
        f"= {', '.join(f'my_{kind}:{kind}' for kind in kinds)} in [DEFAULT] and default_backend = my_{kinds[0]} in "
        f"[imagestore], and move the stores' options from [glance_store] to "
        f"{', '.join(f'[my_{kind}]' for kind in kinds)}; they may keep their names",
        file=files.place("glance_store", None)[0],
        section="DEFAULT",
        option="enabled_backends",
    )


def _default(
    ours: str | None, names: list[str], conf: cfg.ConfigOpts, files: _Files, problems: list[Problem]
) -> str | None:
    glance = _Section("glance_store", conf, files)
    old = _value(glance, _DEFAULT, problems)
    chosen = ours or old
    if ours and old and ours != old:
        problems.append(glance.problem("default_backend", "differs from that of [imagestore]; remove one of them"))
    elif chosen and chosen not in names:
        section = _Section("imagestore", conf, files) if ours else glance
        text = f"names no store of enabled_backends ({', '.join(names) or 'there are none'}){_near(chosen, names)}"
        problems.append(section.problem("default_backend", text))
    return chosen or None


def _driver(kind: str, files: _Files, problems: list[Problem]) -> type[Driver] | None:
    try:
        return load_driver(kind)
    except ConfigurationError as error:
        file, line = files.place("DEFAULT", "enabled_backends")
        problems.append(
            Problem(message=error.message, file=file, line=line, error=type(error), cause=_native_cause(error))
        )
        return None


def _native_cause(error: BaseException) -> Exception | None:
    return error.__cause__ if isinstance(error.__cause__, Exception) else None


def _look_for_unknown(section: _Keywords | _Section, known: set[str], problems: list[Problem]) -> None:
    for key, file, line in section.written():
        if key not in known:
            others = [kind for kind, options in OLD_OPTIONS.items() if any(key == option.name for option in options)]
            hint = f"; it belongs to the type {' or '.join(others)}" if others else _near(key, known)
            # Every place where it stands, not only the last.
            problems.append(replace(section.problem(key, f"is unknown{hint}"), file=file, line=line))


def _plan_store(
    name: str,
    driver: type[Driver],
    sections: Sequence[_Keywords | _Section],
    limits: Limits,
    timeouts: Timeouts,
    problems: list[Problem],
    notes: list[str],
) -> _StorePlan | None:
    """Read a store's options, each from the first section that has it, and make its driver."""
    first = sections[0]
    faults: list[Problem] = []
    options = (*_COMMON, *driver.options)
    olds = old_options(driver.name)
    known = {option.dest for option in options} | {old.name for old in olds}
    known |= {other.name for option in options for other in option.deprecated_opts if other.name}
    _look_for_unknown(first, known, faults)
    for section in sections:
        _look_for_dropped(section, olds, faults, notes)
    values = {}
    incomplete = False
    for option in options:
        mine = [old for old in olds if old.to == option.dest]
        values[option.dest], faulty = _option(option, mine, sections, faults)
        if option.required and not faulty and values[option.dest] in (None, "", []):
            faults.append(first.problem(option.dest, f"is missing{_purpose(option)}"))
            faulty = True
        incomplete = incomplete or faulty
    problems += faults
    if incomplete:
        return None
    weight, description = values.pop("weight"), values.pop("description")
    try:
        made = driver(Options(values), store=name, limits=limits, timeouts=timeouts)
    except Exception as error:  # noqa: BLE001 - a third party's driver may raise anything
        secrets = [str(values[option.dest]) for option in driver.options if option.secret and values[option.dest]]
        problems.append(_refused(first, error, secrets))
        return None
    return _StorePlan(name=name, driver=made, weight=weight, description=description or "")


def _look_for_dropped(
    section: _Keywords | _Section, olds: Iterable[OldOption], problems: list[Problem], notes: list[str]
) -> None:
    """Options that are ignored or refused."""
    for old in olds:
        if old.fate == "kept":
            continue
        try:
            value = section.old(old.name, multi=False)
        except _BadValue as fault:
            problems.append(section.problem(old.name, str(fault)))
            continue
        if value is None:
            continue
        if old.fate == "ignored":
            note = section.problem(old.name, f"is accepted and ignored: {old.reason}")
            notes.append(str(note))
        elif str(value).strip().lower() not in old.harmless:
            problems.append(section.problem(old.name, f"is refused: {old.reason}"))


def _option(
    option: cfg.Opt, olds: list[OldOption], sections: Sequence[_Keywords | _Section], problems: list[Problem]
) -> tuple[Any, bool]:
    """The value of ``option``, by its own name or an old one, and whether there was a fault."""
    value = None
    for section in sections:
        name = option.dest
        names: list[str] = []
        try:
            given, read = section.fetch(option)
            if given:
                names.append(name)
            if given or section is sections[0]:
                value = read
            for old in olds:
                name = old.name
                text = section.old(name, multi=option.multi)
                if text is None or not any(text if isinstance(text, list) else [str(text)]):
                    continue
                names.append(name)
                converted = _converted(old, text)
                if converted is not None:
                    value = _typed(option, converted)
        except _BadValue as fault:
            problems.append(section.problem(name, str(fault)))
            return None, True
        if len(names) > 1:
            problems.append(
                section.problem(names[0], f"is given a second time, by its old name {names[1]}; remove one")
            )
            return None, True
        if names:
            break
    return value, False


def _purpose(option: cfg.Opt) -> str:
    """The first sentence of an option's help."""
    return f": {' '.join(option.help.split()).partition('. ')[0].rstrip('.')}" if option.help else ""


def _refused(section: _Keywords | _Section, error: Exception, secrets: list[str]) -> Problem:
    """What a driver's constructor raised."""
    if isinstance(error, StoreError):
        message, cause = error.message, _native_cause(error)
    else:
        message, cause = f"the driver failed on its options ({type(error).__name__})", error
    for secret in secrets:
        message = message.replace(secret, "***")
        if cause is not None and secret in str(cause):
            cause = None
    kind = type(error) if isinstance(error, ConfigurationError) else ConfigurationError
    return replace(section.problem(None, message), error=kind, cause=cause)
