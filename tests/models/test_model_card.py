"""The model card: only what is known, with units, and code that runs."""

from pathlib import Path

import pytest
import torch

from repcon.models.model_card import escape_markdown, model_card
from repcon.models.preprocessing import Preprocessing, preprocessing_of
from repcon.models.student import Student, save_student
from repcon.models.timm_import import timm

INPUTS = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def test_nothing_known_is_nothing_said() -> None:
    text = model_card({"birds": 5, "generalist": 1000}, INPUTS, {}, "runs/my-student")
    assert text.startswith("# my-student\n\nOne backbone")
    assert "| head | classes |\n|---|---|\n| birds | 5 |\n| generalist | 1000 |\n" in text
    assert "not stated" not in text and "- " not in text and "\n\n\n" not in text


def test_what_is_known_of_one_teacher_only_is_not_stated_of_the_other() -> None:
    teachers = [{"name": "birds", "licence": "CC0-1.0", "weight_hash": "ab" * 32}]
    text = model_card({"birds": 5, "generalist": 1000}, INPUTS, {"name": "s", "teachers": teachers}, "s")
    assert "| head | classes | weights | licence |\n" in text
    assert f"| birds | 5 | {'ab' * 8} | CC0-1.0 |\n| generalist | 1000 | not stated | not stated |\n" in text


def test_what_others_wrote_is_shown_as_it_is() -> None:
    assert escape_markdown("a|b\n*c* <d> e_f _g_ $h$") == "a\\|b \\*c\\* \\<d\\> e_f \\_g\\_ \\$h\\$"
    teachers = [{"name": "birds", "licence": "~~no~~ &lt;"}]
    text = model_card({"birds": 5}, INPUTS, {"name": "<s>", "backbone": "*t*", "teachers": teachers}, "s")
    assert "# \\<s\\>\n" in text and "- Backbone: \\*t\\*" in text and "| birds | 5 | \\~\\~no\\~\\~ \\&lt; |" in text


def test_figures_have_units() -> None:
    metrics = {"birds": {"agreement": 0.125, "kl": 0.34754, "other": 2.0}, "generalist": {"kl": 1.0}}
    text = model_card({"birds": 5}, INPUTS, {"metrics": metrics}, "s")
    assert "| birds | 12.5 % | 0.3475 nat | 2.0000 |\n| generalist |  | 1.0000 nat |  |" in text


def test_the_code_opens_the_folder_that_was_saved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Student(timm.create_model("test_efficientnet", num_classes=0), {"birds": 5}).eval()
    save_student(model, "my-student", preprocessing=preprocessing_of(model.backbone, 64), card={})
    code = Path("my-student/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    opened: dict = {}
    exec(code, opened)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(opened["backbone"].eval()(images), model.features(images))
