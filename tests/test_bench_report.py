"""Results of sweeps become the README's tables and pictures; only those of GPUs, of which the tests make some up by
renaming the device of small CPU runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import numbers

from benchmarks import report
from benchmarks.cli import main
from benchmarks.measure import ceiling, harness
from benchmarks.report import charts, headline, pages, plots, tables

SHAPE = ["--heads", "4/2", "--dtype", "fp32", "--device", "cpu", "--repeats", "1", "--threads", "1"]
RUNS = {
    "decode": ["--batch", "1", "2", "--context", "1024", "2048", "--head-dim", "128", "--budget", "64"],
    "scores": ["--batch", "1", "2", "--context", "1024", "32768", "--head-dim", "128"],
    "attention": ["--context", "1024", "--head-dim", "64", "--page-size", "4", "8", "--budget", "64"],
    "model": [
        *("--layers", "2", "--hidden", "64", "--mlp", "96", "--vocab", "97"),
        *("--head-dim", "16", "--context", "256", "--budget", "64"),
    ],
    "index": ["--context", "1024", "--new", "0", "3", "--head-dim", "64"],
    "topk": ["--rows", "4", "--pages", "1024", "2048", "--values", "random", "two"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A sweep of every benchmark, as if it were of an H100."""
    folder, found = tmp_path_factory.mktemp("results"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.ColdCache, "flush", lambda self: None)
        patch.setattr(ceiling, "SIZES", {"cpu": 1 << 20})
        threads = torch.get_num_threads()
        for name, flags in RUNS.items():
            path = folder / f"{name}.json"
            shape = SHAPE if name != "topk" else SHAPE[2:]
            assert main([name, *flags, *shape, "--out", str(path)]) == 0
            result = json.loads(path.read_text())
            result["environment"] |= {"device": "NVIDIA H100 80GB HBM3", "driver": "580.1"}
            found[name] = result
        torch.set_num_threads(threads)
    return found


def test_no_gpu_results_no_blocks(results: dict[str, dict[str, Any]]):
    assert set(tables.blocks([]).values()) == {""}
    cpu = [{**result, "environment": {**result["environment"], "device": "cpu"}} for result in results.values()]
    assert set(tables.blocks(cpu).values()) == {""}
    assert charts.figures(cpu) == {}
    assert headline.block(cpu) == headline.block([]) == ""


def test_headline_picture(results: dict[str, dict[str, Any]], tmp_path: Path):
    """Of a compiled model, one line for a batch and an index that were measured at several contexts."""
    pytest.importorskip("matplotlib")
    (case,) = results["model"]["cases"]
    peer, side = case["peer"], "unique_exact"
    case = {**case, "compiled": True, "best": {side: side}, "options": {**case["options"], **headline.SETTINGS}}
    times = {(80, 16384): 3.5, (80, 8192): 2.5, (1, 8192): 1.5}
    cases = [
        {
            **case,
            "options": {**case["options"], "batch": batch, "context": context},
            "speedups": {side: {peer: factor}},
        }
        for (batch, context), factor in times.items()
    ]
    (path,) = headline.draw([{**results["model"], "cases": cases}], tmp_path)
    assert path == tmp_path / "model_speed.png"
    assert numbers(path)["lines"] == {"batch 80, exact index": {"8192": 2.5, "16384": 3.5}}
    assert headline.draw([{**results["model"], "cases": cases[1:]}], tmp_path) == []
    plain = [{**each, "compiled": False} for each in cases]
    assert headline.draw([{**results["model"], "cases": plain}], tmp_path) == []


def test_tables(results: dict[str, dict[str, Any]]):
    blocks = tables.blocks(list(results.values()))
    assert blocks.pop("decode shapes gpu") == ""
    assert all("NVIDIA H100 80GB HBM3 (driver 580.1" in block for block in blocks.values())
    case = results["decode"]["cases"][-1]
    assert case["options"]["batch"] == 2
    cell = f"{tables.share(case['unique_decode'])}, **{case['speedup']:.1f}x**"
    line = next(line for line in blocks["decode results gpu"].splitlines() if line.startswith("| 128 | 8 | 2 |"))
    assert line.endswith(f"| {cell} |")
    assert "| D | S | batch | 1K | 2K |" in blocks["decode results gpu"]
    assert "| batch | 1K | 32K |" in blocks["scores results"]
    assert "| batch | D | query tokens | S=4 | S=8 |" in blocks["attention results"]
    assert "| 1 | 1K | all | directional |" in blocks["index results"]
    top = results["topk"]["cases"][1]
    row = next(line for line in blocks["topk results"].splitlines() if line.startswith("| 4 x 1K | two |"))
    assert f"| **{top['peers']['torch']['ratio']:.2f}x** |" in row
    assert "FlashInfer" not in blocks["topk results"]  # absent: no column


def test_cases_that_were_not_timed_have_no_cell(results: dict[str, dict[str, Any]]):
    result = results["decode"]
    cases = [{"options": case["options"], "skipped": "needs 9 GiB"} for case in result["cases"][:1]]
    block = tables.blocks([{**result, "cases": cases + result["cases"][1:]}])["decode results gpu"]
    assert re.search(r"\| 128 \| 8 \| 1 \| - \| \d", block)
    assert tables.blocks([{**result, "cases": cases}])["decode results gpu"] == ""


def test_a_second_storage_of_the_index_has_its_own_lines(results: dict[str, dict[str, Any]]):
    result = results["decode"]
    small = [{**case, "options": {**case["options"], "index_format": "small"}} for case in result["cases"]]
    both = {**result, "cases": result["cases"] + small}
    block = tables.blocks([both])["decode results gpu"]
    assert "| index | D | S | batch | 1K | 2K |" in block
    assert "| exact | 128 | 8 | 1 |" in block
    assert "| small | 128 | 8 | 1 |" in block
    lines = charts.figures([both])["decode_speed_h100.png"].data["lines"]
    assert set(lines) == {"batch 1", "batch 2", "batch 1, small", "batch 2, small"}


def test_more_results_of_a_gpu_share_a_table(results: dict[str, dict[str, Any]]):
    first = results["decode"]

    def again(page_size: int, **environment: str) -> dict[str, Any]:
        cases = [{**case, "options": {**case["options"], "page_size": page_size}} for case in first["cases"]]
        return {**first, "cases": cases, "environment": {**first["environment"], **environment}}

    blocks = tables.blocks([first, again(16), again(4), again(32, device="NVIDIA H200")])
    assert "| 128 | 16 |" not in blocks["decode results gpu"]
    assert blocks["decode results gpu"].count("One decode step") == 2
    shapes = blocks["decode shapes gpu"]
    assert shapes.startswith("`unique_decode` at other shapes on NVIDIA H100 80GB HBM3")
    assert "H200" not in shapes
    assert 0 < shapes.index("| 128 | 4 | 1 |") < shapes.index("| 128 | 4 | 2 |") < shapes.index("| 128 | 16 | 1 |")


def test_all_dense_peers_are_named(results: dict[str, dict[str, Any]]):
    result = {**results["decode"], "peers": {"flashinfer": "1.2"}}
    assert "the fastest way of SDPA, in" in tables.decode([result])
    for case_of, here in ((("sdpa", "sdpa"), " (here SDPA)"), (("sdpa", "flashinfer"), "")):
        cases = [{**case, "flashinfer": case["sdpa"], "peer": best} for case, best in zip(result["cases"], case_of * 2)]
        assert f"the fastest way of FlashInfer 1.2 and SDPA{here}, in" in tables.decode([{**result, "cases": cases}])


def test_several_rules_have_their_own_lines(results: dict[str, dict[str, Any]]):
    result = results["decode"]
    other = [{**case, "options": {**case["options"], "rule": "unique"}} for case in result["cases"]]
    once = {**other[0], "options": {**other[0]["options"], "batch": 9}}
    both = {**result, "cases": [*result["cases"], *other, once]}
    block = tables.blocks([both])["decode results gpu"]
    assert "| rule | D | S | batch | 1K | 2K |" in block
    assert "| unique | 128 | 8 | 1 |" in block
    assert "`directional`" not in block.split("\n\n")[0]
    lines = charts.figures([both])["decode_speed_h100.png"].data["lines"]
    # What was measured at one context has no line.
    assert set(lines) == {f"batch {b}, {rule}" for b in (1, 2) for rule in ("directional", "unique")}


def test_numbers():
    assert [tables.ms(x) for x in (0.01234, 0.5, 1.0, 12.345)] == ["12.3 µs", "500 µs", "1 ms", "12.3 ms"]
    assert [tables.tokens(n) for n in (8, 1000, 1024, 131072)] == ["8", "1000", "1K", "128K"]


# ---- Pages. ----


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with two pages and the results of nothing."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Read me\n")
    (tmp_path / "docs" / "more.md").write_text("# More\n")
    return tmp_path


def test_a_block_goes_wherever_its_markers_stand(root: Path):
    block = f"See:\n\n{plots.image('A picture', 'a.png')}"
    marked = pages.placed("one", "old\n")
    (root / "README.md").write_text(f"before\n{marked}<!-- a comment -->\nafter\n")
    (root / "docs" / "more.md").write_text(f"{marked}between\n{marked}")
    texts = pages.rewrite(root, {"one": block, "two": ""})
    assert texts == {
        root / "README.md": f"before\n{pages.placed('one', block)}<!-- a comment -->\nafter\n",
        root / "docs" / "more.md": "between\n".join([pages.placed("one", "See:\n\n![A picture](a.png)\n")] * 2),
    }
    for page, text in texts.items():
        page.write_text(text)
    assert pages.rewrite(root, {"one": block}) == texts
    assert pages.rewrite(root, {"one": ""})[root / "docs" / "more.md"].count("<!-- one -->\n<!-- /one -->\n") == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"no page has the lines <!-- one --> and <!-- /one -->"),
        ("<!-- one -->\n", r"more.md: expected the lines <!-- one --> and <!-- /one -->, got one of them"),
        ("<!-- /one -->\n", r"more.md: expected the lines <!-- one --> and <!-- /one -->, got one of them"),
        ("<!-- three -->\n<!-- /three -->\n", r"more.md: <!-- three --> marks no block: expected one of one, two"),
        ("<!-- /three -->\n", r"more.md: <!-- /three --> marks no block: expected one of one, two"),
    ],
)
def test_markers_that_lead_nowhere(root: Path, text: str, complaint: str):
    (root / "docs" / "more.md").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        pages.rewrite(root, {"one": "text\n", "two": ""})


def test_pictures_and_page(results: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("matplotlib")
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    argv = ["report", "--results", str(folder), "--root", str(tmp_path)]
    readme.write_text("")
    assert main(argv) == 1  # nowhere to put them
    assert "error: no page has the lines <!-- decode results gpu --> and" in capsys.readouterr().err
    readme.write_text("".join(pages.placed(name, "") for name in report.blocks([])))
    assert main(argv) == 0
    text = readme.read_text()
    pictures = re.findall(r"\]\((docs/[^)]+)\)", text)
    assert pictures == [f"docs/{name}_h100.png" for name in ("decode_speed", "batch1_latency", "roofline")]
    figures = charts.figures(list(results.values()))
    for each in pictures:
        shown, data = numbers(tmp_path / each), figures[Path(each).name].data
        assert {name: shown[name] for name in data} == json.loads(json.dumps(data))
    speed = figures["decode_speed_h100.png"].data
    assert speed["lengths"] == [1024, 2048]
    assert speed["lines"]["batch 1"] == [case["speedup"] for case in results["decode"]["cases"][:2]]
    assert set(figures["batch1_latency_h100.png"].data["lines"]) == {
        "unique_decode",
        "floor of its bytes",
        "SDPA, dense",
    }
    points = figures["roofline_h100.png"].data["points"]
    assert set(points) == {"unique_decode", "SDPA, dense", "page_scores", "sparse_decode", "page_index"}
    assert len(points["page_scores"]) == 4


@pytest.mark.parametrize("logarithmic", [True, False])
def test_plots_of_lengths(tmp_path: Path, logarithmic: bool):
    pytest.importorskip("matplotlib")
    lines = {"soft": [1.0, 4.0, 16.5], "dense": [0.5, 2.0, float("nan")]}
    path = plots.plot_lengths(
        [8192, 16384, 1000], lines, tmp_path / "deep" / "a.png", title="t", logarithmic=logarithmic
    )
    lines["dense"][-1] = None
    assert numbers(path) == {"subtitle": "", "lengths": [8192, 16384, 1000], "lines": lines}
