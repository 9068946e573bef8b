"""What the docs say is what the code does: sizes, and every command."""

import importlib
import json
import re

import pytest
from docs_blocks import PAGES, ROOT, blocks, commands, lines, missing_lines, shortened
from test_model import PARAMETERS

from cvt_keras import VARIANTS, macs
from cvt_keras.cli import COMMANDS
from cvt_keras.training import RECIPES

COMMAND_LINES = [
    pytest.param(words, id=f"{block.page}:{block.line} {' '.join(words)}")
    for page in PAGES
    for block in blocks(page)
    for words in commands(block.script)
]
RESULTS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs" / "results").glob("*.md"))]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_of_sizes(name):
    row = re.compile(rf"\| `{name}` \| (\d+)x\d+ \| (\d+) \| ([\d,]+) \| ([\d,.]+) M \|")
    side, num_classes, parameters, cost = row.search((ROOT / "docs" / "network.md").read_text()).groups()
    assert int(parameters.replace(",", "")) == PARAMETERS[name][0 if num_classes == "1000" else 1]
    expected = macs(name, (int(side), int(side), 3), int(num_classes)) / 1e6
    assert cost == f"{expected:,.1f}"


def _parse(words, recipe_file):
    if words[0].startswith("-"):  # cvt-keras --help
        return
    command = COMMANDS[words[0]]
    if "--recipe-file" in words:  # a file that an earlier command writes
        at = words.index("--recipe-file") + 1
        words = [*words[:at], str(recipe_file), *words[at + 1 :]]
    try:
        importlib.import_module(command.module).parse([*command.before, *words[1:]])
    except SystemExit as end:
        assert "--help" in words and not end.code, words


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.json"
    file.write_text(json.dumps(RECIPES["smoke"].settings()))
    return file


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_commands_are_parsed_by_the_commands_own_parser(words, recipe_file):
    _parse(words, recipe_file)


@pytest.mark.parametrize("page", RESULTS)
def test_commands_that_made_the_results(page, recipe_file):
    for block in blocks(page):
        for words in commands(block.script):
            if not any("$" in word for word in words):  # a loop's
                _parse(words, recipe_file)


def test_a_wrong_command_is_found(recipe_file):
    [words] = commands("cvt-keras train cifar10 \\\n  --epoch-number 3   # no such flag\n")
    with pytest.raises(AssertionError):
        _parse(words, recipe_file)


def test_every_guide_is_run_and_few_blocks_are_not():
    guides = {str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "guides").glob("*.md")}
    assert guides == {page for page in PAGES if page.startswith("docs/")}
    assert len([block for page in PAGES for block in blocks(page) if block.reason]) <= 11


@pytest.mark.parametrize("page", [*PAGES, *RESULTS])
def test_no_command_escapes_the_parser(page):
    assert len(blocks(page)) == (ROOT / page).read_text().count("```bash\n")
    for block in blocks(page):
        for line in lines(block.script):
            if "cvt-keras " in line and "$" not in line:  # not a loop's
                assert list(commands(line)), line


def test_flags_of_benchmarks_exist():
    used = re.compile(r"python (benchmarks/\w+\.py)(.*)")
    assert used.search((ROOT / "docs" / "results" / "speed.md").read_text())
    for page in [*PAGES, *RESULTS]:
        for script, arguments in used.findall((ROOT / page).read_text().replace("\\\n", " ")):
            source = (ROOT / script).read_text()
            for flag in re.findall(r"--([a-z-]+)", arguments.partition("`")[0]):
                assert f"    {flag.replace('-', '_')}: " in source or f'"--{flag}"' in source, f"{page}: {script} --{flag}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_trainings_are_cut_short():
    script = "cvt-keras train --epochs 30 --seed 1  # a while\nTFDS_DATA_DIR=x cvt-keras prune runs/a \\\n --run-dir runs/b\n"
    assert shortened(script).splitlines() == [
        "cvt-keras train  --seed 1 --epochs 1 --train-limit 256  # a while",
        "TFDS_DATA_DIR=x cvt-keras prune runs/a   --run-dir runs/b --epochs 1 --train-limit 256",
    ]
    assert shortened("cvt-keras export runs/a  # all") == "cvt-keras export runs/a  # all"
    installation = "python3.11 -m venv .venv && .venv/bin/pip install -r requirements-dev.txt && .venv/bin/python -m pytest"
    assert shortened(installation) == "python -m pytest -n 0 tests/test_docs.py"


def test_lines_of_an_output_are_compared_but_for_their_numbers():
    shown = "AMD EPYC, 2 cores, float32, XLA off\nEpoch 1/30\n...\n84.21% top-1 on 10,000 test images; the run is in runs/a\n"
    printed = "Intel Xeon, 4 cores, float32, XLA off\r\x1b[1m7/7\x1b[0m\n10.0% top-1 on 32 test images; the run is in runs/a\n"
    assert missing_lines(shown, printed) == []
    for line in ("the run is in runs/a", "1% top-1, on 32 test images; the run is in runs/a", "1% top-1 on 32 pictures."):
        assert missing_lines(line, printed) == [line]
    assert missing_lines("val_accuracy: 0.5 - ...", "5/5 ━━━ - val_accuracy: 0.1 - loss: 3") == ["val_accuracy: 0.5 - ..."]


def test_links_lead_somewhere():
    link = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in link.findall(path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_pages_that_the_code_names_exist():
    for path in [*(ROOT / "cvt_keras").rglob("*.py"), *(ROOT / "export").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for target in re.findall(r"\bdocs/[\w/-]+\.(?:md|csv|png)", path.read_text()):
            assert (ROOT / target).exists(), f"{path.relative_to(ROOT)}: {target}"
