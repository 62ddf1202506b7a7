"""What the documentation says is there: options, commands, files, and the lines of code in the README."""

import io
import re
from pathlib import Path

import pyarrow as pa
import pytest
import typer
from PIL import Image

from cli.main import app
from pipelines.configuration import RunConfig, SourceConfig, _model_in
from pipelines.context import Context
from pipelines.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MADE_LATER = {"docs/report.png"}


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_options_that_a_page_names_exist(page: Path) -> None:
    blocks = {name: _model_in(info.annotation) for name, info in RunConfig.model_fields.items()}
    del blocks["run"]
    blocks["sources"] = SourceConfig
    named = re.findall(r"`(" + "|".join(blocks) + r")\.([a-z_]+)[`:]", page.read_text())
    for block, option in ((b, o) for b, o in named if o != "json"):  # manifest.json is a file
        model = blocks[block]
        assert model is not None and (option in model.model_fields), f"{block}.{option}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_that_a_page_shows_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = re.findall(r"(?m)^curate ([a-z]+)(.*)$", page.read_text())
    for command, arguments in shown:
        assert command in commands, command
        options = {
            name for parameter in commands[command].params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        for option in re.findall(r" (--[a-z0-9-]+)", arguments.split("#")[0]):
            assert option in options, f"curate {command} {option}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_a_page_links_or_names_exist(page: Path) -> None:
    text = page.read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    for target in linked:
        place = (page.parent / target).resolve()
        assert place.exists() or place.relative_to(ROOT).as_posix() in MADE_LATER, target
    for name in re.findall(r"`((?:pipelines|curation|embeddings|cli|configs|tests|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_the_readme_yaml_is_a_valid_list_of_sources() -> None:
    import yaml

    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    sources = [SourceConfig.model_validate(source) for source in yaml.safe_load(block[1])["sources"]]
    assert sources[0].role == "pool"


def test_the_lines_of_the_readme_read_the_images_of_a_manifest(tmp_path: Path) -> None:
    places = []
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        data = io.BytesIO()
        Image.new("RGB", (8, 6), colour).save(data, "PNG")
        (tmp_path / name).write_bytes(data.getvalue())
        places.append({"shard": name, "offset": 0, "length": len(data.getvalue()), "weight": 1.0})
    context = Context(run=RunDirectory(str(tmp_path)))
    generation = context.begin_snapshot("manifest", 1, {}, [])
    assert generation is not None
    generation.parts = [generation.writer.write("part-000000", pa.Table.from_pylist(places))]
    context.finish(generation, {})
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    read: list[tuple[int, int]] = []
    code = block[1].replace('"runs/first"', repr(str(tmp_path))) + "    read.append(image.size)\n"
    exec(code, {"read": read})
    assert read == [(8, 6), (8, 6)]
