"""The pages of the site: those of this folder, one a verb, tables of what there is, tutorials with their output.

`python docs/build.py` writes build/docs and calls mkdocs (strict, no network); `--pages` writes the pages alone, and
`--no-examples` leaves out what examples and tutorials print.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import types
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import site_tables  # noqa: E402 (it lies beside this file)
from site_tables import cell  # noqa: E402

ROOT = HERE.parent
OUT = ROOT / "build" / "docs"

GUIDES = {  # section → its pages in this folder, in order; others come behind them
    "Guides": (
        "commands",
        "training",
        "line",
        "parts",
        "behaviour",
        "merging",
        "merge-tables",
        "adapters",
        "real-data",
        "recipes",
        "showing-results",
        "cluster",
        "coalitions-at-once",
        "speed",
    ),
    "Your own": ("your-own-task", "your-own-loop", "folder-file", "add-a-method"),
    "Reference": ("formats", "servers", "sources"),
}


def main(arguments: list[str]) -> None:
    """Write the pages, then the site."""
    pages = OUT / "pages"
    shutil.rmtree(OUT, ignore_errors=True)
    pages.mkdir(parents=True)
    run = "--no-examples" not in arguments
    nav = {"Start": ["index.md"], "Tutorials": tutorials(pages, run=run), **guides(pages)}
    nav["Start"] += ["start.md", claims(pages)]
    nav["Reference"] = [*site_tables.written(pages), *nav["Reference"]]
    (pages / "site.css").write_text("td:first-child code { white-space: nowrap }\n")  # options in one piece
    nav["Commands"] = verbs(pages, run=run)
    configure(nav)
    if "--pages" not in arguments:
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(OUT / "mkdocs.yml")]
        quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        code = subprocess.run(command, check=False, env=quiet).returncode
        site = os.path.relpath(OUT / "site")
        if code == 0:
            print(f"{site}/index.html; with its search: {Path(sys.executable).name} -m http.server -d {site}")
        sys.exit(code)


def guides(pages: Path) -> dict[str, list[str]]:
    """README as the first page, then the pages of this folder and their pictures, with links that fit the site."""
    (pages / "index.md").write_text(linked((ROOT / "README.md").read_text()))
    (pages / "figures").mkdir()
    for picture in (ROOT / "figures").glob("*.png"):
        shutil.copy(picture, pages / "figures")
    found = {path.stem for path in HERE.glob("*.md")}
    for name in found:
        (pages / f"{name}.md").write_text(linked((HERE / f"{name}.md").read_text()))
    (pages / "recipes.md").write_text(linked((ROOT / "figures" / "recipes" / "README.md").read_text()))
    found.add("recipes")
    known = ["start", "claims", *(name for names in GUIDES.values() for name in names)]
    sections = {title: [f"{name}.md" for name in names if name in found] for title, names in GUIDES.items()}
    sections["Guides"] += sorted(f"{name}.md" for name in found.difference(known))
    for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"):
        (pages / f"{name.lower()}.md").write_text(linked((ROOT / f"{name}.md").read_text()))
        sections["Reference"].append(f"{name.lower()}.md")
    return sections


def linked(text: str) -> str:
    """The page with its links as they are in the site; those to code name it alone."""
    text = re.sub(r"\]\((?:\.\./)?docs/([\w./-]+\.md)", r"](\1", text)
    text = re.sub(r"\]\((?:\.\./)?figures/recipes/README\.md", "](recipes.md", text)
    text = re.sub(r"\]\(\.\./figures/", "](figures/", text)
    text = re.sub(r"\]\((?:docs/)?tutorials/\d_(\w+)\.py\)", lambda m: f"](tutorial-{m[1].replace('_', '-')}.md)", text)
    text = re.sub(r"\]\((?:\.\./)?(CONTRIBUTING|CHANGELOG|SECURITY)\.md", lambda m: f"]({m[1].lower()}.md", text)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)?(?:lora_lab|cli|tests|figures|docs)/[\w./-]+\.(?:py|toml)\)", r"`\1`", text)


def verbs(pages: Path, *, run: bool) -> list[str]:
    """A page a verb: what it says of itself, an example with what it printed, its options."""
    from lora_lab.cli.verbs import VERBS, command_of, function_of

    printed = examples() if run else {}
    names = []
    for verb in VERBS:
        function = function_of(verb)
        told = (function.__doc__ or "").partition("Example:")[0]
        parts = [f"# {verb}", re.sub(r"\n {4}", "\n", told).strip(), "## Example"]
        (example,) = (each for each in listed() if each.get("verb") == verb)
        parts.append(introduced(example))
        parts.append(printed.get(verb) or "\n".join(["```console", *(f"$ {line}" for line in lines(example)), "```"]))
        parts += ["## Options", options(command_of(function))]
        (pages / f"verb-{verb}.md").write_text("\n\n".join(filter(None, parts)) + "\n")
        names.append(f"verb-{verb}.md")
    return names


def options(command: types.FunctionType) -> str:
    """Name, meaning and default of every option, as --help has them."""
    rows = ["| | | default |", "|---|---|---|"]
    for parameter in command.__signature__.parameters.values():  # type: ignore[attr-defined]
        (said,) = [part for part in getattr(parameter.annotation, "__metadata__", ()) if hasattr(part, "help")] or [
            None
        ]
        flags = [getattr(said, "default", None), *(getattr(said, "param_decls", None) or ())]
        flags = [flag for flag in flags if isinstance(flag, str)] or [parameter.name]
        default = ",".join(parameter.default) if isinstance(parameter.default, list) else parameter.default
        names = ", ".join(f"`{flag}`" for flag in flags)
        meaning = cell((getattr(said, "help", "") or "").replace("VERB", "the verb"))
        rows.append(f"| {names} | {meaning} | {default_of(default, flags)} |")
    return "\n".join(rows)


def default_of(default: object, flags: list[str]) -> str:
    """A default as it would be written; nothing of an option that is off, or has to be given."""
    if isinstance(default, bool):
        both = next((flag.split("/") for flag in flags if "/" in flag), ["", ""])
        default = both[0] if default else both[1]
    return "" if default in (None, "") or default is inspect.Parameter.empty else f"`{cell(str(default))}`"


def listed() -> list[dict[str, str]]:
    """All examples."""
    found: list[dict[str, str]] = tomllib.loads((HERE / "examples.toml").read_text())["example"]
    return found


def needed(example: dict[str, str]) -> dict[str, str] | None:
    """The file that an example needs: its name, what is told of it, and its text."""
    files: dict[str, dict[str, str]] = tomllib.loads((HERE / "examples.toml").read_text())["file"]
    return files[example["needs"]] if "needs" in example else None


def introduced(example: dict[str, str]) -> str:
    """What stands before an example: the file that it needs, and what is said of it."""
    file = needed(example)
    shown = [file["told"].strip(), f"```{Path(file['name']).suffix[1:]}\n{file['text'].strip()}\n```"] if file else []
    return "\n\n".join([*shown, *filter(None, [example.get("before")])])


def lines(example: dict[str, str]) -> list[str]:
    """The command lines of an example."""
    return example["run"].strip().splitlines()


def examples() -> dict[str, str]:
    """Verb → its example with what it printed; an example that fails is an error."""
    printed = {}
    program = ["-c", "from lora_lab.cli import main; main()"]
    with tempfile.TemporaryDirectory() as folder:
        for example in listed():
            file, parts = needed(example), []
            if file and not (Path(folder) / file["name"]).exists():
                (Path(folder) / file["name"]).write_text(file["text"].lstrip())
                if file["name"].endswith(".py"):
                    output_of([file["name"]], folder)
            for line in lines(example):
                print("running", line, file=sys.stderr)
                parts.append(f"$ {line}\n{output_of([*program, *line.split()[1:]], folder)}")
            if "verb" in example:
                printed[example["verb"]] = "\n".join(["```console", *parts, "```"])
    return printed


def output_of(words: list[str], folder: str) -> str:
    """What Python prints with these arguments, run in the folder."""
    quiet = {**os.environ, "COLUMNS": "110"}
    told = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False, env=quiet)
    if told.returncode:
        sys.exit(f"{' '.join(words)}: {told.stdout}{told.stderr}")
    return told.stdout.rstrip()


def tutorials(pages: Path, *, run: bool) -> list[str]:
    """The scripts in tutorials/ as pages: text, code, and what each cell printed."""
    names = []
    for path in sorted((HERE / "tutorials").glob("*.py")):
        name = f"tutorial-{path.stem[2:].replace('_', '-')}.md"
        (pages / name).write_text(executed(path, run=run))
        names.append(name)
    return names


def cells(path: Path) -> list[tuple[bool, str]]:
    """Whether it is code, and the text, of every cell of a script in the percent format."""
    found = []
    for part in re.split(r"^# %% ?", path.read_text(), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        code = head.strip() != "[markdown]"
        found.append((code, body.strip() if code else re.sub(r"^# ?", "", body, flags=re.M).strip()))
    return found


def executed(path: Path, *, run: bool) -> str:
    """The cells of a script as a page, with what they print where they are run."""
    parts, names, here = [], {"__name__": "__main__"}, Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for code, text in cells(path):
            parts.append(f"```python\n{text}\n```" if code else text)
            if code and run:
                heard = io.StringIO()
                os.chdir(folder)
                try:
                    with contextlib.redirect_stdout(heard):
                        exec(compile(text, str(path), "exec"), names)
                finally:
                    os.chdir(here)
                if heard.getvalue():
                    parts.append(f"```text\n{heard.getvalue().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def claims(pages: Path) -> str:
    """What papers claim, with what was published, and what was found where that was measured."""
    from lora_lab.claims.claims import read
    from lora_lab.results.result import Result

    measured = [Result.load(path) for path in sorted((ROOT / "figures" / "results").glob("claims_*.json"))]
    found = {(row["claim"], r.parameters["testbed"]): row for r in measured for row in r.rows()}
    beds = [result.parameters["testbed"] for result in measured]
    head = ["claim", "source", "published", *beds]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for claim in read()[0]:
        told = [verdict(found.get((claim.name, bed))) for bed in beds]
        rows.append(
            "| " + " | ".join(map(cell, [claim.says, claim.source, "; ".join(map(str, claim.published)), *told])) + " |"
        )
    text = (HERE / "claims.md").read_text() if (HERE / "claims.md").exists() else "# What is true so far"
    (pages / "claims.md").write_text(linked(text).rstrip() + "\n\n" + "\n".join(rows) + "\n")
    return "claims.md"


def verdict(row: dict[str, object] | None) -> str:
    """The verdict with the difference and its interval."""
    if row is None:
        return ""
    if row["difference"] is None:
        return str(row["verdict"])
    return f"**{row['verdict']}**: {row['difference']:.3g} [{row['difference_low']:.3g}, {row['difference_high']:.3g}]"


def configure(nav: dict[str, list[str]]) -> None:
    """mkdocs.yml beside the pages: that of this folder with the order of the pages."""
    lines = [f"INHERIT: {os.path.relpath(HERE / 'mkdocs.yml', OUT)}", "nav:"]
    for title, names in nav.items():
        lines += [f"  - {title}:", *(f"      - {title_of(name)}{name}" for name in names)]
    (OUT / "mkdocs.yml").write_text("\n".join(lines) + "\n")


def title_of(name: str) -> str:
    """The name of a verb's page; all others have a heading that says it."""
    return f"{name.removeprefix('verb-').removesuffix('.md')}: " if name.startswith("verb-") else ""


if __name__ == "__main__":
    main(sys.argv[1:])
