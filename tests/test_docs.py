"""What the documentation lists is what there is."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import NAMED_RULES
from pictures import numbers

import unique_attn
from benchmarks import report
from benchmarks.cli import main
from benchmarks.report import pages
from unique_attn import TrainConfig, UniqueConfig, ops

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in FILES}


def table(head: str) -> list[list[str]]:
    """The cells of the one table in the README and docs/ whose first heading begins with ``head``."""
    pattern = rf"^\| {re.escape(head)}.*\n\|[-| ]+\n((?:\|.*\n)+)"
    (rows,) = [rows for text in PAGES.values() for rows in re.findall(pattern, text, re.MULTILINE)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows.splitlines()]


@pytest.mark.parametrize("config", [UniqueConfig, TrainConfig])
def test_config_tables(config: type):
    fields = [(f"`{each.name}`", each.default) for each in dataclasses.fields(config)]
    shown = [(name, ast.literal_eval(value.strip("`"))) for name, value, _ in table(f"`{config.__name__}` field")]
    assert shown == fields


def required(op: Callable[..., Any]) -> str:
    """What a call of an op must give it, as the table of ops writes it."""
    parameters = inspect.signature(op).parameters.values()
    needed = [each for each in parameters if each.default is each.empty]
    names = [each.name for each in needed if each.kind is not each.KEYWORD_ONLY]
    keywords = [each.name for each in needed if each.kind is each.KEYWORD_ONLY]
    return f"`{op.__name__}({', '.join([*names, *(['*'] if keywords else []), *keywords])})`"


def test_ops_table():
    helpers = {"decode_index", "index_entry_bytes", "score_dtype"}
    helpers |= {"pack_block_mask", "query_block_slots", "unpack_block_mask"}
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    rows = [row[0] for row in table("op |")]
    assert sorted(rows) == sorted(required(getattr(ops, name)) for name in functions - helpers)


def test_rules_table():
    listed = [row[0] for row in table("rule | $u$")]
    assert set(listed) <= {f"`{name}`" for name in ops.RULES}
    assert set(listed) >= {f"`{name}`" for name in NAMED_RULES}


def test_sizes_of_the_index():
    """Bytes of entries, and what share of the keys and values they are."""
    rows = table("bytes of an entry, 16-bit keys")
    formats = [
        (rule, index)
        for rule in NAMED_RULES
        for index in ops.INDEX_FORMATS
        if index == "exact" or ops.RULES[rule].compressible
    ]
    shown = {row[0]: row[1:] for row in rows}
    assert len(shown) == len(formats)
    shares = {}
    for rule, index in formats:
        sizes = {
            dim: ops.index_entry_bytes(rule=rule, head_dim=dim, dtype=torch.bfloat16, index_format=index)
            for dim in (64, 128)
        }
        shares[rule, index] = [f"{100 * size / (8 * 2 * dim * 2):.1f}%" for dim, size in sizes.items()]
        assert shown[f"`{rule}`, {index}"] == [*map(str, sizes.values()), *shares[rule, index]]
    (early,) = re.findall(r"\*\*The cache does not shrink\.\*\*(?:.+\n)+?(?=- )", PAGES["README.md"])
    assert set(re.findall(r"[\d.]+%", early)) == {*shares["directional", "exact"], *shares["directional", "compressed"]}


def test_numbers_come_from_committed_results():
    results = report.load(ROOT / "benchmarks" / "results")
    assert {result["bench"] for result in results} >= {"demo", "decode"}
    for page, text in pages.rewrite(ROOT, report.blocks(results)).items():
        assert page.read_text("utf-8") == text, "run `make report`"
    for name, block in report.blocks(results).items():
        homes = [page for page, text in PAGES.items() if f"<!-- {name} -->" in text]
        assert len(homes) == 1 or not (homes or block), f"{name}: expected in one page, found in {homes}"


def test_measured_machines_are_named():
    """Every machine and torch that a committed result is of, where a reader looks first."""
    rows = table("machine | torch | results")
    for result in report.load(ROOT / "benchmarks" / "results"):
        where = result["environment"]
        machine = where["cpu"] if where["device"] == "cpu" else where["device"]
        assert any(row[0].startswith(machine) and row[1] == where["torch"] for row in rows), where
        assert where["torch"] in PAGES["README.md"]


def test_temperatures_come_from_committed_results():
    (file,) = (ROOT / "benchmarks" / "results").glob("finetune-h100-tau.json")
    summary = json.loads(file.read_text("utf-8"))["summary"]
    for row in table("`tau` |"):
        sparse = summary[f"trained soft, tau {row[0].split()[0]}"]["sparse"]
        assert row[1:] == [f"{sparse['retrieval']['mean']:.0%}", f"{sparse['perplexity']['mean']:.2f}"]


def test_pictures_come_from_committed_results(tmp_path: Path):
    """By the numbers in them: pixels depend on the version of matplotlib."""
    pytest.importorskip("matplotlib")
    drawn = report.draw(report.load(ROOT / "benchmarks" / "results"), tmp_path)
    for path in drawn:
        assert numbers(path) == numbers(ROOT / "docs" / path.name), "run `make report`"
    assert {path.name for path in drawn} | {"selection.png"} == {path.name for path in (ROOT / "docs").glob("*.png")}


def test_the_page_of_the_answer():
    """What is said of the demo's picture, from the numbers in it."""
    shares = numbers(ROOT / "docs" / "selection.png")["shares"]
    said = re.findall(
        r"up to (\d+%) of the\s+90 heads read it.+?the median page, by (\d+%)", PAGES["docs/quality.md"], re.DOTALL
    )
    assert said == [(f"{max(shares['the answer']):.0%}", f"{max(shares['median page']):.0%}")]
    above = [i for i, pair in enumerate(zip(shares["the answer"], shares["90th percentile"])) if pair[0] > pair[1]]
    assert above == list(range(9, 15))  # the steps that chose the digits of 73914, and the full stop after them


def sweep() -> dict[str, Any]:
    """A result of `benchmarks soft_mask` over lengths on a GPU, with numbers that are easy to recognize."""

    def time(ms: float) -> dict[str, float]:
        return {"median_ms": ms}

    def side(n: int, factor: float) -> dict[str, Any]:
        return {
            "forward": time(factor * n), "step": time(3 * factor * n), "backward_ms": 2 * factor * n,
            "times_peer": {"forward": factor, "backward": factor, "step": factor},
            "tflops": {"forward": 100 / factor, "backward": 100 / factor, "step": 100 / factor},
            "memory": {"forward_bytes": (n << 20) * factor, "backward_bytes": (n << 21) * factor},
        }  # fmt: skip

    factors = {"soft": 1.25, "hard": 1.5, "dense": 1.125, "sdpa_flash_attention": 1, "sdpa_cudnn": 0.5}
    options = {"heads": "32/8", "head_dim": 128, "dtype": "bf16", "rule": "directional", "budget": 512, "page_size": 8}
    return {
        "bench": "soft_mask",
        "options": options,
        "environment": {"device": "NVIDIA H100", "torch": "2.13.0"},
        "peer": "sdpa_flash_attention",
        "lengths": [
            {
                "tokens": 8192 * n,
                "sides": {name: side(n, factor) for name, factor in factors.items()},
                "parts": {"index": time(0.25), "boundary": time(0.5), "selection": time(4.0)},
            }
            for n in (1, 2, 4)
        ],
        "bytes_per_token": {"soft": {"forward": 160.0, "backward": 320.4}},
    }


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Some blocks on one page and some on another."""
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "more.md"
    page.parent.mkdir()
    blocks = report.blocks(report.load(ROOT / "benchmarks" / "results"))
    names = list(blocks)
    for file, here in ((readme, names[::2]), (page, names[1::2])):
        file.write_text("".join(pages.placed(name, "old\n") for name in here))
    assert main(["report", "--root", str(tmp_path)]) == 0
    assert readme.read_text() == "".join(pages.placed(name, blocks[name]) for name in names[::2])
    written = [pages.placed(name, blocks[name].replace("](docs/", "](")) for name in names[1::2]]
    assert page.read_text() == "".join(written)
    assert capsys.readouterr().out == f"wrote {readme}, {page} and the pictures in {tmp_path / 'docs'}\n"
    assert main(["report", "--print"]) == 0
    assert capsys.readouterr().out == "\n".join(block for block in blocks.values() if block)


def test_report_of_training(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("matplotlib")
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    readme.write_text("# Read me\n")
    argv = ["report", "--results", str(folder), "--root", str(tmp_path)]
    (folder / "one-length.json").write_text(json.dumps({"bench": "soft_mask", "options": {"tokens": 8192}}))
    assert main(argv) == 0  # without a result over lengths there is nothing to say
    assert readme.read_text() == "# Read me\n"
    assert not (tmp_path / "docs").exists()
    (folder / "soft-mask.json").write_text(json.dumps(sweep()))
    assert main(argv) == 1
    assert "<!-- training results -->" in capsys.readouterr().err
    readme.write_text(pages.placed("training results", ""))
    assert main(argv) == 0
    text = readme.read_text()
    assert "| tokens | FlashAttention-2 | cuDNN | soft mask | hard mask | no mask, our kernels |" in text
    assert (
        "| 16,384 | 2.00 + 4.00 ms | 1.00 + 2.00 ms (0.50x) | 2.50 + 5.00 ms (**1.25x**) | 3.00 + 6.00 ms (1.50x) | "
        "2.25 + 4.50 ms (1.12x) | 80 / 100 | 0.25 + 0.50 ms | 2 / 5 MiB |"
    ) in text
    assert "160 / 320 bytes per token" in text
    pictures = re.findall(r"\]\((docs/[^)]+)\)", text)
    assert pictures == ["docs/training_time.png", "docs/training_memory.png"]
    assert numbers(tmp_path / pictures[0])["lines"]["soft mask"] == [3.75, 7.5, 15.0]
    assert numbers(tmp_path / pictures[1])["lines"]["soft mask"] == [2.5, 5.0, 10.0]
    (folder / "soft-mask-2.json").write_text(json.dumps(sweep()))
    assert main(argv) == 0
    assert (tmp_path / "docs" / "training_memory_2.png").exists()


def test_public_names_are_there():
    """After `import unique_attn` alone, and without loading what is large, or absent, before it is asked for."""
    text = re.sub(r"<!--.*?-->", "", "".join(PAGES.values()))
    names = sorted(set(re.findall(r"unique_attn\.(\w+)", text)) - {"git"})
    code = f"""
        import sys, unique_attn
        assert not {{"transformers", "matplotlib"}} & set(sys.modules)
        missing = {{*{names}, *unique_attn.__all__}} - set(dir(unique_attn))
        assert not missing, missing
        for name in ("hf", "ops", "reference", "reference_index", "train", "viz"):
            assert getattr(unique_attn, name).__name__ == "unique_attn." + name
        assert not {{"transformers", "matplotlib"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)
    for name in names:
        assert hasattr(unique_attn, name), name


def test_no_advice_that_fails():
    """There is no release on a package index: `pip install unique_attn` would find nothing, or something else."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    files += [
        file
        for folder in ("unique_attn", "build_tools", "examples", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
    ]
    for file in files:
        assert not re.search(r"pip install[^\n`]*\bunique[_-]attn(\[|\b(?!\.git))", file.read_text("utf-8")), file


def anchors(text: str) -> set[str]:
    """Where links into a page may lead: its headings, as GitHub names them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str):
    """Links and pictures, and what looks like a path of this repository."""
    text = (ROOT / page).read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        if not link.startswith("http"):
            target, _, anchor = link.partition("#")
            file = (ROOT / page).parent / target if target else ROOT / page
            assert file.exists(), link
            assert not anchor or anchor in anchors(file.read_text("utf-8")), link
            if page.startswith("docs/"):
                assert file.resolve().parent == ROOT / "docs", f"{link}: the site holds docs/ alone"
    for path in re.findall(r"`((?:csrc|unique_attn|tests|examples|build_tools|benchmarks)/[\w/.-]+)`", text):
        if not re.search(r"\b(test_)?X\b", path):  # X stands for any op
            assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:finetune|index-quality|soft-mask|model|decode)-[\w-]+\.json)`", text):
        assert (ROOT / "benchmarks" / "results" / path).exists(), path


@pytest.mark.parametrize("page", [*PAGES])
def test_pages_begin_with_one_title(page: str):
    """So that Sphinx makes one page of the site of each, and no part of it is lost."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    assert text.startswith("# ")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    html = set(re.findall(r"</?([a-z]\w*)[^>]*>", re.sub(r"<!--.*?-->|`[^`]*`", "", text)))
    assert html <= {"details", "summary"}


def test_readme_is_short():
    assert PAGES["README.md"].count("\n") < 220


class Messages(ast.NodeVisitor):
    """Every string of a program; what is formatted into it is left out and marked."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self.found.append("".join(x.value if isinstance(x, ast.Constant) else "\0" for x in node.values))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found.append(node.value)


def test_troubleshooting_quotes_real_messages():
    messages = Messages()
    for folder in ("unique_attn", "build_tools", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            messages.visit(ast.parse(file.read_text("utf-8")))
    text = PAGES["docs/troubleshooting.md"]
    tables = re.findall(r"^\| (?:message|it says) \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [line.split(" | ")[0] for rows in tables for line in rows.splitlines()]
    quotes = [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]
    quotes += re.findall(r"`((?:this layer is|a layer holds|attention over|is a \.\.\. op|transformers')[^`]+)`", text)
    assert len(quotes) > 60
    for quote in quotes:
        if quote == "UnsupportedFeatureError":
            continue
        parts = [re.escape(part) for part in quote.split("...")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(message) for message in messages.found), quote
