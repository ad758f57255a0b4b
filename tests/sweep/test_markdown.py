"""The report as Markdown."""

from __future__ import annotations

from pathlib import Path

from ssmlora_dist.sweep.document import Cell, Plot, Report, Section, Table
from ssmlora_dist.sweep.markdown import markdown_text


def test_the_whole_text() -> None:
    table = Table(
        "Losses", ["group", "final_loss"], [[Cell("lora"), Cell("2.5", 2.5, "[2, 3]")], [Cell("b"), Cell("")]]
    )
    section = Section("Means", [table], [Plot(Path("out/plots/loss.png"), "loss by length")])
    text = markdown_text(Report("Sweep trial", ["Two points."], [section]), Path("out"))
    assert text == (
        "# Sweep trial\n\n- Two points.\n\n## Means\n\n![loss by length](plots/loss.png)\n\n"
        "**Losses**\n\n| group | final\\_loss |\n| --- | --- |\n| lora | 2.5 \\[2, 3\\] |\n| b |  |\n"
    )


def test_text_is_no_markup() -> None:
    table = Table("t", ["group"], [[Cell("a|b <i>*c*</i> `d` [e](f) \\")]])
    text = markdown_text(Report("r", [], [Section("s", [table])]), Path())
    assert "| a\\|b &lt;i&gt;\\*c\\*&lt;/i&gt; \\`d\\` \\[e\\](f) \\\\ |" in text
