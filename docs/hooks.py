"""What `make docs` makes of these pages besides formatting them: reference pages from the code, and links.

`docs/studies.md` in the text of a page becomes a link to that page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import latex2mathml.converter
import typer
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from ebft_study.cli import app
from ebft_study.config import RunConfig, unread_settings
from ebft_study.config.keys import short_name
from ebft_study.config.sections import Section
from ebft_study.results.metrics import METRICS, Metric
from ebft_study.study.spec.study_spec import StudySpec

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

FORMULA = re.compile(r"\$\$(.+?)\$\$", flags=re.DOTALL)
PAGE = re.compile(r"`(?:docs/)?(\w+)\.md`")
NOT_FOR_FILES = "not for study files"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages."""
    for name, content in pages().items():
        files.append(File.generated(config, f"reference/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of the names of pages, and MathML of formulas, which browsers show without a script."""
    above = "../" * page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        name = f"{match[1]}.md"
        return f"[{match[1]}]({above}{name})" if files.get_file_from_path(name) else match[0]

    linked = PAGE.sub(link, markdown)
    return FORMULA.sub(lambda match: latex2mathml.converter.convert(match[1], display="block"), linked)


def pages() -> dict[str, str]:
    """File name -> content."""
    return {
        "settings.md": settings(),
        "study_file.md": study_file(),
        "metrics.md": metrics(),
        "commands.md": commands(),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [
        header,
        ["---"] * len(header),
        *([cell.replace("|", "\\|").replace("\n", " ") for cell in r] for r in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- settings --------------------------------------------------------------------------------------------------


def settings() -> str:
    """The settings of a run, section by section."""
    parts = [
        "# Settings of a run",
        "A setting goes by its short name or by `section.name`, in study files (`run:`, `axes:`), in the files of "
        "`ebft-study train`, and on the command line as `name=value`. The short name is its column in the results.",
    ]
    parts += ["## Of the run itself", _settings("", RunConfig, skip_sections=True)]
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            section = type(field.default)
            parts += [f"## `{name}`", _summary(section), _settings(f"{name}.", section)]
    return "\n\n".join(parts) + "\n"


def _settings(prefix: str, section: type[BaseModel], *, skip_sections: bool = False) -> str:
    rows = []
    for name, shape in _properties(section).items():
        if skip_sections and isinstance(section.model_fields[name].default, Section):
            continue
        short = short_name(prefix + name)
        ignored = [method for method in ("ebft", "sft", "rlvr") if short in unread_settings(method)]
        notes = [shape.get("description", ""), f"not read by {' and '.join(ignored)}" if ignored else ""]
        rows.append([f"`{short}`", _type(shape), _default(shape), "; ".join(filter(None, notes))])
    return table(["Setting", "Values", "Default", "Meaning"], rows)


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


def _properties(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    return dict(model.model_json_schema(by_alias=True).get("properties", {}))


def _type(shape: Mapping[str, Any]) -> str:
    """The values that a field takes, in words and limits."""
    if "anyOf" in shape:
        return " or ".join(dict.fromkeys(_type(each) for each in shape["anyOf"]))
    if "enum" in shape:
        return ", ".join(f"`{value}`" for value in shape["enum"])
    if "const" in shape:
        return f"`{shape['const']}`"
    if "$ref" in shape:
        return f"[{shape['$ref'].rpartition('/')[2]}](#{shape['$ref'].rpartition('/')[2].lower()})"
    kind = shape.get("type", "any value")
    if kind == "array":
        return f"list of {_type(shape.get('items', {}))}"
    words = {
        "integer": "whole number",
        "string": "text",
        "boolean": "`true`, `false`",
        "object": "mapping",
        "null": "none",
    }
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limited = [f"{sign} {shape[name]:g}" for name, sign in limits.items() if name in shape]
    return " ".join([words.get(kind, kind), ", ".join(limited)]).strip()


def _default(shape: Mapping[str, Any]) -> str:
    if "default" not in shape or isinstance(shape["default"], dict) or "$ref" in shape:
        return ""
    value = shape["default"]
    if value is None or value == []:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# --- study files -----------------------------------------------------------------------------------------------


def study_file() -> str:
    """The sections of a study file."""
    definitions = StudySpec.model_json_schema()["$defs"]
    keys = {n: s for n, s in _properties(StudySpec).items() if NOT_FOR_FILES not in s.get("description", "")}
    rows = [[f"`{name}`", _type(shape), shape.get("description", "")] for name, shape in keys.items()]
    parts = [
        "# Sections of a study file",
        "`docs/studies.md` explains them with examples.",
        table(["Key", "Values", "Meaning"], rows),
    ]
    used: dict[str, None] = {}
    pending = [name for shape in keys.values() for name in _references(shape)]
    while pending:
        name = pending.pop(0)
        if name not in used:
            used[name] = None
            pending += [
                other for each in definitions[name].get("properties", {}).values() for other in _references(each)
            ]
    for name in used:
        fields = definitions[name].get("properties", {})
        rows = [[f"`{n}`", _type(s), _default(s), s.get("description", "")] for n, s in fields.items()]
        about = definitions[name].get("description", "").partition("\n")[0]
        parts += [f"## {name}", *([about] if about else []), table(["Key", "Values", "Default", "Meaning"], rows)]
    return "\n\n".join(parts) + "\n"


def _references(shape: Any) -> Iterator[str]:
    if isinstance(shape, Mapping):
        if "$ref" in shape:
            yield shape["$ref"].rpartition("/")[2]
        for inner in shape.values():
            yield from _references(inner)
    elif isinstance(shape, list):
        for inner in shape:
            yield from _references(inner)


# --- metrics ---------------------------------------------------------------------------------------------------


def metrics() -> str:
    """The registry of metrics."""
    groups = {
        "Objectives": [m for m in METRICS.values() if m.is_objective],
        "Of evaluations": [m for m in METRICS.values() if "evaluations" in m.tables and not m.is_objective],
        "Of training": [m for m in METRICS.values() if m.tables == ("metrics",) and not m.is_objective],
    }
    parts = [
        "# Metrics",
        "Columns of the table `metrics` and values of `metric` in the table `evaluations`. Searches, schedulers and "
        "stopping rules can ask for those under *Objectives*. Two configurations are compared by a metric only where "
        "they agree in the settings that change what it measures.",
    ]
    for title, group in groups.items():
        parts += [f"## {title}", table(["Metric", "Unit", "Better", "Meaning"], [_metric(m) for m in group])]
    return "\n\n".join(parts) + "\n"


def _metric(metric: Metric) -> list[str]:
    better = {"min": "lower", "max": "higher", None: ""}[metric.direction]
    return [f"`{metric.name}`", metric.unit, better, metric.description]


# --- commands --------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options."""
    group = typer.main.get_command(app)
    parts = ["# Commands"]
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        about, *examples = [line.strip() for line in (command.help or "").split("\n") if line.strip()]
        shown = [line.replace("[dim]", "").replace("[/dim]", "") for line in examples]
        rows = [[_names(each), _plain(each)] for each in command.params if each.name != "help"]
        parts += [f"## `ebft-study {name}`", about]
        parts += ["```bash\n" + "\n".join(shown) + "\n```"] if shown else []
        parts += [table(["Argument or option", "Meaning"], rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def _names(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    return ", ".join(f"`{name}`" for name in (parameter.opts if is_option else [parameter.name.upper()]))


def _plain(parameter: Any) -> str:
    text = (getattr(parameter, "help", None) or "").replace("[bold]", "`").replace("[/bold]", "`")
    default = getattr(parameter, "show_default", None)
    if isinstance(default, str):
        return f"{text} Default: {default}."
    return text
